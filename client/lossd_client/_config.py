"""What configurations of losses are made of."""

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.writing import Piece, message_field, tags_of
from lossd_client._errors import refused_here
from lossd_client._packing import pack_labels, pack_prediction, pack_tensor
from lossd_client._storage import Storage

ITEM = tags_of(pb.LossItem.DESCRIPTOR)


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
        return message_field(ITEM[self.kind], pieces)

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


@lru_cache
def tags_of_inputs(kind: str) -> dict[str, bytes]:
    """Returns the tags of the inputs of a loss by name."""
    return tags_of(pb.LossItem.DESCRIPTOR.fields_by_name[kind].message_type)


def keep(config: Any, **plain: Any) -> None:
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


def reduction_number(kind: str, name: str) -> Any:
    """Returns the contract's number for the reduction of a kind of loss, as `enum_number` does."""
    return enum_number(losses_pb2.Reduction, "REDUCTION_", f"{kind}.reduction", name)


def enum_number(wire: Any, prefix: str, field: str, name: str) -> Any:
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
