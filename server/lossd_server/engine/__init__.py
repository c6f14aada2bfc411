"""Runs the work: places it on the device, one evaluation at a time, until told to drain."""

from lossd_server.engine.custom import CustomLoss, load_custom_losses
from lossd_server.engine.devices import describe_device, device_memory, has_kernels, resolve_device
from lossd_server.engine.engine import Engine
from lossd_server.engine.resources import granted_cores, granted_memory, keep_freed_memory, use_granted_cores
from lossd_server.engine.work import (
    AssignItem,
    AssignJob,
    LossItem,
    LossJob,
    LossOutcome,
    Timing,
)

__all__ = [
    "AssignItem",
    "AssignJob",
    "CustomLoss",
    "Engine",
    "LossItem",
    "LossJob",
    "LossOutcome",
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
