"""The loss and the assigner of FCOS as a caller configures them; the names are the specification's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lossd.v1 import losses_pb2
from lossd.writing import Piece, message_field
from lossd_client._config import (
    ITEM,
    LossConfig,
    enum_number,
    keep,
    plain_number,
    tags_of_inputs,
    whole_number,
)
from lossd_client._packing import pack_ground_truth
from lossd_client._storage import Storage

_WEIGHTS = tuple(
    f"{term}{name}" for term in ("cls", "reg", "centerness") for name in ("_weight", "_loss_weight")
)


@dataclass(frozen=True, slots=True)
class FCOSAssigner:
    """How ground truth becomes FCOS targets.

    Attributes:
        strides: Pixels between neighbouring locations, one a level.
        regress_ranges: `(min, max)` of the farthest side, pixels, one a level; None means the ranges
            of the five default strides.
        preset: Whose rules to follow: `autotimm`.
        box_format: `xyxy`, `xywh` or `cxcywh`.
    """

    strides: Sequence[int] = (8, 16, 32, 64, 128)
    regress_ranges: Sequence[tuple[float, float]] | None = None
    preset: str = "autotimm"
    box_format: str = "xyxy"

    def __post_init__(self) -> None:
        """Keeps plain numbers and names: assigners are told apart by them, and nobody changes them."""
        ranges = self.regress_ranges
        keep(
            self,
            strides=() if self.strides is None else tuple(map(whole_number, self.strides)),
            regress_ranges=None if ranges is None else tuple((float(a), float(b)) for a, b in ranges),
            preset=str(self.preset),
            box_format=str(self.box_format),
        )

    def message(self, path: str = "assigner") -> losses_pb2.FCOSAssigner:
        """Returns the configuration as the contract's message; `path` is where it stands, for errors."""
        box_format = enum_number(losses_pb2.BoxFormat, "BOX_FORMAT_", f"{path}.box_format", self.box_format)
        return losses_pb2.FCOSAssigner(
            preset=enum_number(losses_pb2.AssignerPreset, "ASSIGNER_PRESET_", f"{path}.preset", self.preset),
            strides=self.strides,
            regress_ranges=[
                losses_pb2.RegressRange(min=low, max=high) for low, high in self.regress_ranges or ()
            ],
            box_format=box_format,
        )


@dataclass(frozen=True, slots=True)
class FCOSLoss(LossConfig):
    """The combined loss of an FCOS head.

    Called with `cls_preds`, `reg_preds`, `centerness_preds`, one array a level each, and then either
    `cls_targets`, `reg_targets`, `centerness_targets` likewise, optionally followed by
    `ignored_targets`, or the ground truth: for each image a mapping with `boxes` `[N, 4]` and `labels`
    `[N]`, optionally `iscrowd` `[N]`.

    Attributes:
        num_classes: Number of classes, the channels of `cls_preds`.
        focal_alpha: Alpha of the focal loss; None weighs all classes alike.
        focal_gamma: Gamma of the focal loss.
        cls_weight: Weight of the classification component.
        reg_weight: Weight of the regression component.
        centerness_weight: Weight of the centerness component.
        strides: Strides of the assigner, for ground truth.
        regress_ranges: Ranges of the assigner; None means those of the default strides.
        preset: `autotimm` or `documented`; None lets the kind of targets choose.
        box_format: Layout of the ground truth's boxes: `xyxy`, `xywh` or `cxcywh`.
        cls_loss_weight: The documented name of `cls_weight`.
        reg_loss_weight: The documented name of `reg_weight`.
        centerness_loss_weight: The documented name of `centerness_weight`.
    """

    kind = "fcos"
    inputs = (
        "cls_preds",
        "reg_preds",
        "centerness_preds",
        "cls_targets",
        "reg_targets",
        "centerness_targets",
        "ignored_targets",
    )
    differentiable = inputs[:3]
    labels = ("cls_targets",)

    num_classes: int
    focal_alpha: float | None = 0.25
    focal_gamma: float = 2.0
    cls_weight: float | None = None
    reg_weight: float | None = None
    centerness_weight: float | None = None
    strides: Sequence[int] = (8, 16, 32, 64, 128)
    regress_ranges: Sequence[tuple[float, float]] | None = None
    preset: str | None = None
    box_format: str = "xyxy"
    cls_loss_weight: float | None = None
    reg_loss_weight: float | None = None
    centerness_loss_weight: float | None = None

    def __post_init__(self) -> None:
        """Refuses a weight under both of its names with `TypeError`; keeps plain numbers and names."""
        for name in ("cls", "reg", "centerness"):
            if None not in (getattr(self, f"{name}_weight"), getattr(self, f"{name}_loss_weight")):
                raise TypeError(f"{name}_weight and {name}_loss_weight are one: give one")
        assigner = self._assigner()
        keep(
            self,
            num_classes=whole_number(self.num_classes),
            strides=assigner.strides,
            regress_ranges=assigner.regress_ranges,
            box_format=assigner.box_format,
            preset=None if self.preset is None else str(self.preset),
        )
        for name in ("focal_alpha", "focal_gamma", *_WEIGHTS):
            keep(self, **{name: plain_number(getattr(self, name))})

    def message(self) -> losses_pb2.FCOSLoss:
        """Returns the configuration as the contract's message."""
        preset = self.preset or "unspecified"
        return losses_pb2.FCOSLoss(
            num_classes=self.num_classes,
            focal_alpha=-1.0 if self.focal_alpha is None else self.focal_alpha,
            focal_gamma=self.focal_gamma,
            cls_weight=_given(self.cls_weight, self.cls_loss_weight),
            reg_weight=_given(self.reg_weight, self.reg_loss_weight),
            centerness_weight=_given(self.centerness_weight, self.centerness_loss_weight),
            preset=enum_number(losses_pb2.LossPreset, "LOSS_PRESET_", "fcos.preset", preset),
            assigner=self._assigner().message("fcos.assigner"),
        )

    def item(self, arguments: Sequence[Any], path: str, storage: Storage) -> list[Piece]:
        """Returns the `LossItem` of one evaluation; see `LossConfig.item`."""
        if len(arguments) not in {4, 6, 7}:
            raise TypeError(
                "FCOSLoss takes cls_preds, reg_preds, centerness_preds and then three lists of targets "
                f"or the ground truth: got {len(arguments)} arguments"
            )
        lists = arguments[:3] if len(arguments) == 4 else arguments
        tags = tags_of_inputs(self.kind)
        pieces: list[Piece] = []
        for name, levels in zip(self.inputs, lists, strict=False):
            for i, level in enumerate(levels):
                pieces += self._field(name, f"{path}.{name}[{i}]", tags[name], level, storage)
        if len(arguments) == 4:
            pieces += pack_ground_truth(f"{path}.ground_truth", tags["ground_truth"], arguments[3], storage)
        return message_field(ITEM[self.kind], pieces)

    def _assigner(self) -> FCOSAssigner:
        return FCOSAssigner(
            strides=self.strides, regress_ranges=self.regress_ranges, box_format=self.box_format
        )


def _given(weight: float | None, documented: float | None) -> float | None:
    return documented if weight is None else weight
