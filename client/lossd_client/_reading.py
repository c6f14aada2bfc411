"""The parts that answers of several methods have in common."""

from functools import lru_cache
from operator import attrgetter
from typing import Any

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_client._arrays import Array

_FIELDS = [field.name for field in pb.StageTimings.DESCRIPTOR.fields]
_STAGES = [name.removesuffix("_us") for name in _FIELDS]
_read_stages = attrgetter(*_FIELDS)


def optional_array(message: Any, field: str, payloads: Payloads) -> Array | None:
    """Returns the array of a tensor field, or None where it is not set."""
    tensor: tensor_pb2.Tensor = getattr(message, field)
    return unpack(tensor, payloads) if message.HasField(field) else None


def timings_of(timings: pb.StageTimings) -> dict[str, float]:
    """Returns the seconds of each stage."""
    return {stage: spent / 1e6 for stage, spent in zip(_STAGES, _read_stages(timings), strict=True)}


@lru_cache(maxsize=64)
def preset_name(wire: Any, number: int) -> str:
    """Returns our name for a preset, or its number when this client does not know it."""
    if number not in wire.values():
        return str(number)
    return str(wire.Name(number)).removeprefix("LOSS_PRESET_").removeprefix("ASSIGNER_PRESET_").lower()
