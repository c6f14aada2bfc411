"""The usual layout of sparse targets of a few locations: so the server writes it, and so a client reads it.

It follows from their number. What `lossd.answers` says of layouts holds here too.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from lossd.answers import TensorLayout
from lossd.narrow import type_depends_on_values
from lossd.tensors import Array, aligned
from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import NoVarintError, read_varint
from lossd.wire import Buffer
from lossd.writing import ALIGNMENT, elements_of, message_head, tags_of, tensor_head

_RESULTS = tags_of(pb.AssignTargetsResponse.DESCRIPTOR)["results"]
_SPARSE = tags_of(pb.TargetResult.DESCRIPTOR)["sparse"]
_TAGS = tags_of(pb.SparseTargets.DESCRIPTOR)

_INT32, _INT64, _FLOAT32 = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<f4")

_TENSORS: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]] = (
    ("locations", _INT32, (4,)),
    ("labels", _INT64, ()),
    ("ltrb", _FLOAT32, (4,)),
    ("centerness", _FLOAT32, ()),
    ("matched", _INT32, ()),
)
"""What there is of each location: type, and shape."""

_NONE_IGNORED = tensor_head(_TAGS["ignored"], _INT32, (0, 4))

_LOCATION_BYTES = 48
"""What the elements of one location take."""

_HEADS_BYTES, _MOST_HEADS_BYTES = 72, 96
"""What targets have beside elements: about, and at most."""

_ABOUT_BYTES = 64
"""What a result has beside targets, about."""


class TargetParts(NamedTuple):
    """The one result of an answer.

    Attributes:
        about: All of the result but its targets.
        tensors: Locations, labels, distances, centerness and matched boxes, views of the answer; no location
            is ignored.
        rest: What the answer has beside the result.
    """

    about: pb.TargetResult
    tensors: list[Array]
    rest: pb.AssignTargetsResponse


class TargetsLayout(NamedTuple):
    """Where the tensors of the targets lie, which come first in their result.

    Attributes:
        tensors: Those that `TargetParts` has; elements of four bytes lie mostly where they can be used, in
            the first result of an answer. The first begins with the head of the targets themselves.
        size: How many bytes the targets take.
        field_size: How many they take as a field of their result.
    """

    tensors: Sequence[TensorLayout]
    size: int
    field_size: int

    def pieces(self, arrays: Sequence[Array]) -> list[Buffer]:
        """Returns targets, as a field of their result.

        Args:
            arrays: The tensors in order, in these types and shapes.
        """
        pieces: list[Buffer] = []
        for tensor, array in zip(self.tensors, arrays, strict=True):
            pieces += tensor.head, elements_of(array)
        pieces.append(_NONE_IGNORED)
        return pieces


def has_layout(count: int) -> bool:
    """Whether targets of so many locations have a usual layout: all their integers go as they are."""
    return not type_depends_on_values(_INT32, count * 4 * _INT32.itemsize)


@lru_cache(maxsize=1024)
def targets_layout(count: int) -> TargetsLayout:
    """Returns the layout of targets of so many locations."""
    about = count * _LOCATION_BYTES + _HEADS_BYTES
    at = len(message_head(_RESULTS, about + _ABOUT_BYTES)) + len(message_head(_SPARSE, about))
    tensors = []
    for name, dtype, row in _TENSORS:
        shape = (count, *row)
        padding = -(at + len(tensor_head(_TAGS[name], dtype, shape))) % ALIGNMENT
        head, size = tensor_head(_TAGS[name], dtype, shape, padding), math.prod(shape) * dtype.itemsize
        at += len(head) + size
        tensors.append(TensorLayout(head, size, dtype, shape))
    size = sum(len(tensor.head) + tensor.size for tensor in tensors) + len(_NONE_IGNORED)
    first = message_head(_SPARSE, size)
    tensors[0] = tensors[0]._replace(head=first + tensors[0].head)
    return TargetsLayout(tensors, size, len(first) + size)


def read_sparse_targets(data: bytes) -> TargetParts | None:
    """Returns the one result of an answer; None where it has another layout, or is none."""
    try:
        size, start = read_varint(data, len(_RESULTS))
        layout = _layout_of_size(read_varint(data, start + len(_SPARSE))[0])
        at, end = start, start + size
        if not (
            layout is not None
            and data.startswith(_RESULTS)
            and data[start - 1]  # else it is padded, and whether it may be is protobuf's to say
            and start + layout.field_size <= end <= len(data)
        ):
            return None
        tensors = []
        for head, size, dtype, shape in layout.tensors:
            if not data.startswith(head, at):
                return None
            at += len(head) + size
            tensors.append(aligned(np.ndarray(shape, dtype, data, at - size)))
        if not data.startswith(_NONE_IGNORED, at):
            return None
        about = pb.TargetResult.FromString(data[at + len(_NONE_IGNORED) : end])
        rest = pb.AssignTargetsResponse.FromString(data[end:])
    except (DecodeError, NoVarintError):
        return None
    return None if rest.results or about.WhichOneof("targets") else TargetParts(about, tensors, rest)


@lru_cache(maxsize=1024)
def _layout_of_size(size: int) -> TargetsLayout | None:
    """Returns the layout of targets of so many bytes; None where there is none."""
    for count in range(max((size - _MOST_HEADS_BYTES) // _LOCATION_BYTES, 0), size // _LOCATION_BYTES + 1):
        if has_layout(count) and targets_layout(count).size == size:
            return targets_layout(count)
    return None
