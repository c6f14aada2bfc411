"""The losses but that of FCOS as a caller configures them; the names are the specification's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossd.v1 import losses_pb2
from lossd.writing import Piece, message_field, tags_of
from lossd_client._config import ITEM, LossConfig, keep, plain_number, reduction_number, tags_of_inputs
from lossd_client._packing import pack_tensor
from lossd_client._storage import Storage


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
        keep(self, alpha=alpha, gamma=gamma, reduction=str(self.reduction))

    def message(self) -> losses_pb2.FocalLoss:
        """Returns the configuration as the contract's message."""
        alpha = -1.0 if self.alpha is None else self.alpha
        return losses_pb2.FocalLoss(
            alpha=alpha, gamma=self.gamma, reduction=reduction_number(self.kind, self.reduction)
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
        keep(self, reduction=str(self.reduction), eps=plain_number(self.eps))

    def message(self) -> losses_pb2.GIoULoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.GIoULoss(reduction=reduction_number(self.kind, self.reduction), eps=self.eps)


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
        keep(self, reduction=str(self.reduction))

    def message(self) -> losses_pb2.CenternessLoss:
        """Returns the configuration as the contract's message."""
        return losses_pb2.CenternessLoss(reduction=reduction_number(self.kind, self.reduction))


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
        return message_field(ITEM[self.kind], pieces)

    def input_path(self, path: str, name: str) -> str:
        """Returns where an input stands in the request; see `LossConfig.input_path`."""
        return f"{path}.tensors[{name}]"
