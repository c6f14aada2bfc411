"""The losses and the assigner that a request's configuration describes."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from google.protobuf.message import Message

from lossd.v1 import losses_pb2 as pb
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.losses import CenternessLoss, FCOSLoss, FocalLoss, GIoULoss, LossModule
from lossd_server.rpc.enums import ASSIGNER_PRESETS, BOX_FORMATS, LOSS_PRESETS, REDUCTIONS
from lossd_server.targets import DEFAULT_STRIDES, AssignerPreset, BoxFormat, FCOSAssigner

T = TypeVar("T")


def loss_of(kind: str, config: Message) -> LossModule:
    """Returns the module that a loss configuration describes; equal ones are made once.

    Raises:
        InvalidInputError: A setting is out of range; the field starts with `kind`.
    """
    with errors_within(kind):
        return _loss(kind, config.SerializeToString(deterministic=True))


def assigner_of(config: pb.FCOSAssigner) -> FCOSAssigner:
    """Returns the assigner that a configuration describes; equal ones are made once.

    Raises:
        InvalidInputError: A setting is out of range.
    """
    return _assigner(config.SerializeToString(deterministic=True))


@lru_cache(maxsize=256)
def _assigner(data: bytes) -> FCOSAssigner:
    config = pb.FCOSAssigner.FromString(data)
    return FCOSAssigner(
        strides=tuple(config.strides) or DEFAULT_STRIDES,
        regress_ranges=tuple((r.min, r.max) for r in config.regress_ranges) or None,
        preset=_member(ASSIGNER_PRESETS, config.preset, "preset", AssignerPreset.AUTOTIMM),
        box_format=_member(BOX_FORMATS, config.box_format, "box_format", BoxFormat.XYXY),
    )


@lru_cache(maxsize=256)
def _loss(kind: str, config: bytes) -> LossModule:
    return _BUILDERS[kind](config)


def _focal(data: bytes) -> FocalLoss:
    config = pb.FocalLoss.FromString(data)
    return FocalLoss(
        alpha=_optional(config, "alpha", 0.25),
        gamma=_optional(config, "gamma", 2.0),
        reduction=_reduction(config.reduction),
    )


def _giou(data: bytes) -> GIoULoss:
    config = pb.GIoULoss.FromString(data)
    return GIoULoss(reduction=_reduction(config.reduction), eps=_optional(config, "eps", 1e-7))


def _centerness(data: bytes) -> CenternessLoss:
    config = pb.CenternessLoss.FromString(data)
    return CenternessLoss(reduction=_reduction(config.reduction))


def _fcos(data: bytes) -> FCOSLoss:
    config = pb.FCOSLoss.FromString(data)
    with errors_within("assigner"):
        assigner = assigner_of(config.assigner)
    return FCOSLoss(
        num_classes=config.num_classes,
        focal_alpha=_optional(config, "focal_alpha", 0.25),
        focal_gamma=_optional(config, "focal_gamma", 2.0),
        cls_weight=_optional(config, "cls_weight", 1.0),
        reg_weight=_optional(config, "reg_weight", 1.0),
        centerness_weight=_optional(config, "centerness_weight", 1.0),
        preset=_member(LOSS_PRESETS, config.preset, "preset", None),
        assigner=assigner,
    )


_BUILDERS = {"focal": _focal, "giou": _giou, "centerness": _centerness, "fcos": _fcos}

LOSS_KINDS = (*_BUILDERS, "custom")
"""Names of the losses in the contract's `oneof`."""


def _optional(config: Message, field: str, default: float) -> float:
    return float(getattr(config, field)) if config.HasField(field) else default


def _reduction(number: int) -> str:
    return _member(REDUCTIONS, number, "reduction", REDUCTIONS[pb.REDUCTION_MEAN])


def _member(table: Mapping[int, T], number: int, field: str, default: T) -> T:
    """Returns our member for the contract's number; 0 means the default."""
    if number == 0:
        return default
    if number not in table:
        raise InvalidInputError(
            Reason.INVALID_OPTION, f"is {number}, which this server does not know", field=field, value=number
        )
    return table[number]
