"""The losses and the assigner as a caller configures them; the names are the specification's."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.writing import Piece, message_field, tags_of
from lossd_client._errors import refused_here
from lossd_client._packing import pack_ground_truth, pack_labels, pack_prediction, pack_tensor
from lossd_client._storage import Storage

_ITEM = tags_of(pb.LossItem.DESCRIPTOR)

_WEIGHTS = tuple(
    f"{term}{name}" for term in ("cls", "reg", "centerness") for name in ("_weight", "_loss_weight")
)


class LossConfig:
    """A loss that the server can evaluate.

    Attributes:
        kind: Its name in the contract's `oneof`.
        inputs: Names of its arguments, in order.
        differentiable: Those that gradients can be asked for.
        labels: Those that hold labels, which are sent in a smaller type where they fit.
        coordinates: Those whose differences matter: they are sent in their own type always.
    """

    kind: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[tuple[str, ...]]
    labels: ClassVar[tuple[str, ...]] = ()
    coordinates: ClassVar[tuple[str, ...]] = ()

    def message(self) -> Any:
        """Returns the configuration as the contract's message."""
        raise NotImplementedError

    def item(self, arguments: Sequence[Any], path: str, storage: Storage) -> list[Piece]:
        """Returns the `LossItem` of one evaluation.

        Args:
            arguments: In the order of `inputs`.
            path: Where the arguments stand in the request, for errors: `items[3].focal`.
            storage: What the request is packed into.

        Raises:
            TypeError: There are too few or too many.
            InvalidInputError: An argument is no tensor of the contract.
        """
        if len(arguments) > len(self.inputs):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.inputs)}: got {len(arguments)}")
        tags = tags_of_inputs(self.kind)
        pieces: list[Piece] = []
        for name, value in zip(self.inputs, arguments, strict=False):
            if value is not None:
                pieces += self._field(name, f"{path}.{name}", tags[name], value, storage)
        return message_field(_ITEM[self.kind], pieces)

    def input_path(self, path: str, name: str) -> str:
        """Returns where an input stands in the request, given where the arguments do."""
        return f"{path}.{name}"

    def _field(self, name: str, path: str, tag: bytes, value: Any, storage: Storage) -> list[Piece]:
        """Returns an argument, or a level of one, as a field."""
        if name in self.labels:
            return pack_labels(path, tag, value, storage)
        if name in self.differentiable:
            return pack_prediction(path, tag, value, storage, keep=name in self.coordinates)
        return pack_tensor(path, tag, value, storage)


@dataclass(frozen=True, slots=True)
class FocalLoss(LossConfig):
    """Sigmoid focal loss; called with `inputs`, `targets`.

    Attributes:
        alpha: Weight of a row's own class, at most 1; None weighs all classes alike.
        gamma: Focusing parameter, at least 0.
        reduction: `mean`, `sum` or `none`.
    """

    kind = "focal"
    inputs = ("inputs", "targets")
    differentiable = ("inputs",)
    labels = ("targets",)

    alpha: float | None = 0.25
    gamma: float = 2.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Keeps plain numbers and names: losses are told apart by them, and nobody changes them."""
        alpha, gamma = plain_number(self.alpha), plain_number(self.gamma)
        _keep(self, alpha=alpha, gamma=gamma, reduction=str(self.reduction))

    def message(self) -> losses_pb2.FocalLoss:
        """Returns the configuration as the contract's message."""
        alpha = -1.0 if self.alpha is None else self.alpha
        return losses_pb2.FocalLoss(
            alpha=alpha, gamma=self.gamma, reduction=_reduction(self.kind, self.reduction)
        )


@dataclass(frozen=True, slots=True)
class GIoULoss(LossConfig):
    """Generalized IoU loss; called with `pred_boxes`, `target_boxes` and optionally `weights`.

    Attributes:
        reduction: `mean`, `sum` or `none`.
        eps: Floor of the union's and the enclosing box's area, square pixels.
    """

    kind = "giou"
    inputs = ("pred_boxes", "target_boxes", "weights")
    differentiable = ("pred_boxes",)
    coordinates = ("pred_boxes",)

    reduction: str = "mean"
    eps: float = 1e-7

    def __post_init__(self) -> None:
        """Keeps plain numbers and names, as a focal loss does."""
        _keep(self, reduction=str(self.reduction), eps=plain_number(self.eps))

    def message(self) -> losses_pb2.GIoULoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.GIoULoss(reduction=_reduction(self.kind, self.reduction), eps=self.eps)


@dataclass(frozen=True, slots=True)
class CenternessLoss(LossConfig):
    """Cross-entropy on centerness; called with `pred`, `target` and optionally `weights`.

    Attributes:
        reduction: `mean`, `sum` or `none`.
    """

    kind = "centerness"
    inputs = ("pred", "target", "weights")
    differentiable = ("pred",)

    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Keeps a plain name, as a focal loss does."""
        _keep(self, reduction=str(self.reduction))

    def message(self) -> losses_pb2.CenternessLoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.CenternessLoss(reduction=_reduction(self.kind, self.reduction))


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
        _keep(
            self,
            strides=() if self.strides is None else tuple(map(whole_number, self.strides)),
            regress_ranges=None if ranges is None else tuple((float(a), float(b)) for a, b in ranges),
            preset=str(self.preset),
            box_format=str(self.box_format),
        )

    def message(self, path: str = "assigner") -> losses_pb2.FCOSAssigner:
        """Returns the configuration as the contract's message; `path` is where it stands, for errors."""
        return losses_pb2.FCOSAssigner(
            preset=_enum(losses_pb2.AssignerPreset, "ASSIGNER_PRESET_", f"{path}.preset", self.preset),
            strides=self.strides,
            regress_ranges=[
                losses_pb2.RegressRange(min=low, max=high) for low, high in self.regress_ranges or ()
            ],
            box_format=_enum(losses_pb2.BoxFormat, "BOX_FORMAT_", f"{path}.box_format", self.box_format),
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
        _keep(
            self,
            num_classes=whole_number(self.num_classes),
            strides=assigner.strides,
            regress_ranges=assigner.regress_ranges,
            box_format=assigner.box_format,
            preset=None if self.preset is None else str(self.preset),
        )
        for name in ("focal_alpha", "focal_gamma", *_WEIGHTS):
            _keep(self, **{name: plain_number(getattr(self, name))})

    def message(self) -> losses_pb2.FCOSLoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.FCOSLoss(
            num_classes=self.num_classes,
            focal_alpha=-1.0 if self.focal_alpha is None else self.focal_alpha,
            focal_gamma=self.focal_gamma,
            cls_weight=_given(self.cls_weight, self.cls_loss_weight),
            reg_weight=_given(self.reg_weight, self.reg_loss_weight),
            centerness_weight=_given(self.centerness_weight, self.centerness_loss_weight),
            preset=_enum(losses_pb2.LossPreset, "LOSS_PRESET_", "fcos.preset", self.preset or "unspecified"),
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
        return message_field(_ITEM[self.kind], pieces)

    def _assigner(self) -> FCOSAssigner:
        return FCOSAssigner(
            strides=self.strides, regress_ranges=self.regress_ranges, box_format=self.box_format
        )


@dataclass(frozen=True, slots=True)
class CustomLoss(LossConfig):
    """A module that the operator loaded; called with one mapping of its inputs by name.

    Attributes:
        name: The name it was loaded under.
    """

    kind = "custom"
    inputs = ("tensors",)
    differentiable = ()

    name: str

    def message(self) -> losses_pb2.CustomLoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.CustomLoss(name=self.name)

    def item(self, arguments: Sequence[Any], path: str, storage: Storage) -> list[Piece]:
        """Returns the `LossItem` of one evaluation; see `LossConfig.item`."""
        if len(arguments) != 1 or not isinstance(arguments[0], Mapping):
            raise TypeError(f"{self.name} takes one mapping of its inputs by name")
        entry = losses_pb2.CustomInputs.TensorsEntry
        tag, value_tag = tags_of_inputs(self.kind)["tensors"], tags_of(entry.DESCRIPTOR)["value"]
        pieces: list[Piece] = []
        for name, value in arguments[0].items():
            field = pack_tensor(self.input_path(path, name), value_tag, value, storage, on_gpu=True)
            pieces += message_field(tag, [entry(key=name).SerializeToString(), *field])
        return message_field(_ITEM[self.kind], pieces)

    def input_path(self, path: str, name: str) -> str:
        """Returns where an input stands in the request; see `LossConfig.input_path`."""
        return f"{path}.tensors[{name}]"


@lru_cache
def tags_of_inputs(kind: str) -> dict[str, bytes]:
    """Returns the tags of the inputs of a loss by name."""
    return tags_of(pb.LossItem.DESCRIPTOR.fields_by_name[kind].message_type)


def _keep(config: Any, **plain: Any) -> None:
    """Sets attributes of a configuration that is being made."""
    for name, value in plain.items():
        object.__setattr__(config, name, value)


def plain_number(value: Any) -> float | None:
    """Returns a number as Python's own, None as it is; raises `TypeError` for text and what else is none."""
    if isinstance(value, str):
        raise TypeError(f"must be real number, not {value!r}")
    return None if value is None else float(value)


def whole_number(value: Any) -> int:
    """Returns a whole number as Python's own; raises `TypeError` for any other."""
    return int(operator.index(value))


def _given(weight: float | None, documented: float | None) -> float | None:
    return documented if weight is None else weight


def _reduction(kind: str, name: str) -> Any:
    return _enum(losses_pb2.Reduction, "REDUCTION_", f"{kind}.reduction", name)


def _enum(wire: Any, prefix: str, field: str, name: str) -> Any:
    """Returns the contract's number for a name; raises `InvalidInputError` when there is none."""
    number = _number(wire, f"{prefix}{str(name).upper()}")
    if number is None:
        names = [k.removeprefix(prefix).lower() for k in wire.keys()[1:]]
        reason = pb.ERROR_REASON_INVALID_OPTION
        raise refused_here(reason, f"is {name!r}, want one of {', '.join(names)}", field=field, value=name)
    return number


@lru_cache(maxsize=256)
def _number(wire: Any, key: str) -> Any:
    return wire.Value(key) if key in wire.keys() else None  # noqa: SIM118  # no mapping, but it has keys()
