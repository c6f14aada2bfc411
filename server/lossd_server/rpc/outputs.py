"""Where the gradients of an item are to be written: slices of shared memory that the caller names."""

from collections.abc import Mapping, Sequence
from typing import Any

from lossd.tensors import DTYPES
from lossd.v1 import loss_service_pb2 as pb
from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.shared_memory import AnyArray, Slices

Place = tuple[bytes, int]
"""Where an array lies in shared memory: the region, and the offset in bytes."""

Places = Mapping[str, Sequence[Place]]
"""Where the gradients of an item are written, by input name, one or one a level."""

NOWHERE: Places = {}


def places_of(item: pb.LossItem) -> Places:
    """Returns the places that an item names."""
    return {
        output.input: [(wanted.region_id, wanted.offset) for wanted in output.slices]
        for output in item.outputs
    }


def read_outputs(
    request: pb.ComputeLossRequest, index: int, arguments: Mapping[str, Any], slices: Slices
) -> dict[str, list[AnyArray]]:
    """Returns the arrays that gradients are to be written to, by input name, one or one a level.

    Args:
        request: The request.
        index: Which of its items.
        arguments: The item's arguments.
        slices: The shared memory that the request names.

    Raises:
        InvalidInputError: No such gradient is asked for, or a slice is no place for it.
    """
    found: dict[str, list[AnyArray]] = {}
    for place, output in enumerate(request.items[index].outputs):
        path = f"outputs[{place}]"
        _check_name(f"{path}.input", output.input, request, found)
        inputs = arguments[output.input]
        likes = inputs if isinstance(inputs, list) else [inputs]
        checks.require_count(f"{path}.slices", len(output.slices), output.input, len(likes))
        found[output.input] = [
            _array(f"{path}.slices[{level}]", index, wanted, like, request.gradient_dtype, slices)
            for level, (wanted, like) in enumerate(zip(output.slices, likes, strict=True))
        ]
    return found


def _check_name(field: str, name: str, request: pb.ComputeLossRequest, found: Mapping[str, Any]) -> None:
    if name not in request.gradients:
        asked = ", ".join(request.gradients) or "none"
        raise InvalidInputError(
            Reason.INVALID_OPTION,
            f"is {name!r}, the gradients asked for are: {asked}",
            field=field,
            value=name,
            gradients=asked,
        )
    if name in found:
        raise InvalidInputError(
            Reason.INVALID_OPTION, f"is {name!r}, which has a place already", field=field, value=name
        )


def _array(
    path: str, index: int, wanted: Any, like: AnyArray, gradient_dtype: Any, slices: Slices
) -> AnyArray:
    dtype = DTYPES.get(gradient_dtype, like.dtype)
    with errors_within(path):
        return slices.write(f"items[{index}].{path}", wanted.region_id, wanted.offset, dtype, like.shape)
