"""Object-detection losses as `torch.nn.Module`s, usable without any server.

Each module computes its value and its closed-form gradient together; `forward` attaches the gradient
to autograd, `evaluate` hands both out with all that a remote caller needs.
"""

from lossd_server.losses.centerness import CenternessLoss
from lossd_server.losses.evaluation import Component, Evaluation, EvaluationOptions, LossOutcome, NonFinite
from lossd_server.losses.fcos import FCOSLoss
from lossd_server.losses.focal import FocalLoss
from lossd_server.losses.giou import GIoULoss
from lossd_server.losses.module import LossModule
from lossd_server.losses.presets import LossPreset
from lossd_server.losses.reduction import Reduction

__all__ = [
    "CenternessLoss",
    "Component",
    "Evaluation",
    "EvaluationOptions",
    "FCOSLoss",
    "FocalLoss",
    "GIoULoss",
    "LossModule",
    "LossOutcome",
    "LossPreset",
    "NonFinite",
    "Reduction",
]
