"""The contract's enums and ours, value for value; a value without its counterpart fails at import."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from lossd.v1 import loss_service_pb2, losses_pb2
from lossd_server.errors import Reason
from lossd_server.losses import LossPreset, Reduction
from lossd_server.targets import AssignerPreset, BoxFormat

E = TypeVar("E", bound=StrEnum)


def _counterparts(wire: Any, prefix: str, ours: type[E]) -> Mapping[int, E]:
    """Returns our enum's members by the contract's numbers."""
    names = {name.removeprefix(prefix): number for name, number in wire.items() if number != 0}
    members = {member.name: member for member in ours}
    if names.keys() != members.keys():
        raise ImportError(
            f"{wire.DESCRIPTOR.name} and {ours.__name__} differ: {names.keys() ^ members.keys()}"
        )
    return {number: members[name] for name, number in names.items()}


REDUCTIONS = _counterparts(losses_pb2.Reduction, "REDUCTION_", Reduction)
LOSS_PRESETS = _counterparts(losses_pb2.LossPreset, "LOSS_PRESET_", LossPreset)
ASSIGNER_PRESETS = _counterparts(losses_pb2.AssignerPreset, "ASSIGNER_PRESET_", AssignerPreset)
BOX_FORMATS = _counterparts(losses_pb2.BoxFormat, "BOX_FORMAT_", BoxFormat)
REASONS = _counterparts(loss_service_pb2.ErrorReason, "ERROR_REASON_", Reason)


def number_of(table: Mapping[int, E], member: E) -> Any:
    """Returns the contract's number for one of our members; stubs give each enum a type of its own."""
    for number, candidate in table.items():
        if candidate is member:
            return number
    raise KeyError(member)


def numbers_of(table: Mapping[int, E]) -> list[Any]:
    """Returns the contract's numbers of all our members."""
    return list(table)
