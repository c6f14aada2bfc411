"""Runs the work: whose turn it is, what goes together, on which device, until told to drain."""

from lossd_server.engine.admission import Admission, LockedBudget, Place
from lossd_server.engine.asker import Asker
from lossd_server.engine.batching import Batching
from lossd_server.engine.buffers import BufferPool
from lossd_server.engine.custom import CustomLoss, load_custom_losses
from lossd_server.engine.devices import describe_device, device_memory, has_kernels, resolve_device
from lossd_server.engine.engine import Engine
from lossd_server.engine.home import Home
from lossd_server.engine.resources import granted_cores, granted_memory, keep_freed_memory, use_granted_cores
from lossd_server.engine.work import (
    AssignItem,
    AssignJob,
    LossItem,
    LossJob,
    Timing,
)

__all__ = [
    "Admission",
    "Asker",
    "AssignItem",
    "AssignJob",
    "Batching",
    "BufferPool",
    "CustomLoss",
    "Engine",
    "Home",
    "LockedBudget",
    "LossItem",
    "LossJob",
    "Place",
    "Timing",
    "describe_device",
    "device_memory",
    "granted_cores",
    "granted_memory",
    "has_kernels",
    "keep_freed_memory",
    "load_custom_losses",
    "resolve_device",
    "use_granted_cores",
]
