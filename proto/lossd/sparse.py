"""What a `SparseTensor` means: the pair of functions between it and arrays `[B, K, H, W]`.

Both sides use it, as they do `lossd.tensors`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd.tensors import Array, TensorError, array_of, layout, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd.writing import Piece, message_field, tags_of, tensor_field

Places = NDArray[Any]
"""Places of rows, the K numbers of one location, counted along `[B, H, W]`; ascending integers."""

_TAGS = tags_of(pb.SparseTensor.DESCRIPTOR)

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)

_HEADER_BYTES = 40
"""What a sparse tensor's two parts take on the wire beyond a dense one's, at most."""


def is_smaller(arrays: Sequence[Array], places: Sequence[Places]) -> bool:
    """Returns whether arrays take fewer bytes on the wire with these rows of each alone."""
    saved = 0
    for array, rows in zip(arrays, places, strict=True):
        row_bytes = _place_type(array.shape).itemsize + array.shape[1] * array.itemsize
        saved += array.nbytes - len(rows) * row_bytes - _HEADER_BYTES
    return saved > 0


def sparse_tensor_field(tag: bytes, array: Array, places: Places) -> list[Piece]:
    """Returns the `SparseTensor` that holds some rows of an array `[B, K, H, W]`, as a field of a message.

    Args:
        tag: The tag of the field.
        array: The whole.
        places: Which of its rows; all others are exactly zero.
    """
    if not len(places):
        return [_field_without_rows(tag, array.shape, array.dtype)]
    batch, _, height, width = array.shape
    return _field(tag, array.shape, places, _rows_of(array)[np.unravel_index(places, (batch, height, width))])


def unpack_sparse(
    sparse: pb.SparseTensor,
    shape: Sequence[int],
    payloads: Payloads | None = None,
    dtype: np.dtype[Any] | None = None,
) -> Array:
    """Returns the whole array `[B, K, H, W]` that a sparse tensor holds, in memory of its own.

    Args:
        sparse: The tensor.
        shape: What it must be the shape of: a few bytes can say that they mean gigabytes.
        payloads: Those of the message that it came in.
        dtype: Of the array; None means that of the rows.

    Raises:
        TensorError: The shape is another, or places and rows do not go with it or with each other.
    """
    if tuple(sparse.shape) != tuple(shape) or len(shape) != 4:
        _refuse(f"shape is {list(sparse.shape)}, want {list(shape)}", "INVALID_SHAPE")
    batch, channels, height, width = shape
    places = _read_places(sparse.places, batch * height * width, payloads)
    values = unpack(sparse.values, payloads)
    if values.shape != (len(places), channels):
        _refuse(f"values are {list(values.shape)}, want {[len(places), channels]}", "INVALID_SHAPE")
    if dtype is not None and dtype != values.dtype:
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
    array = np.zeros(shape, values.dtype)
    if len(places):
        _rows_of(array)[np.unravel_index(places, (batch, height, width))] = values
    return array


def _rows_of(array: Array) -> Array:
    """Returns a view `[B, H, W, K]` of an array `[B, K, H, W]`."""
    return array.transpose(0, 2, 3, 1)


def _field(tag: bytes, shape: tuple[int, ...], places: Places, rows: Array) -> list[Piece]:
    about = pb.SparseTensor(shape=shape).SerializeToString()
    numbers = tensor_field(_TAGS["places"], places.astype(_place_type(shape), copy=False))
    return message_field(tag, [about, *numbers, *tensor_field(_TAGS["values"], rows)])


@lru_cache(maxsize=1024)
def _field_without_rows(tag: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Returns what is written of a level without an object, of which there are many."""
    pieces: Sequence[Any] = _field(tag, shape, np.empty(0, np.int64), np.empty((0, shape[1]), dtype))
    return b"".join(pieces)


def _read_places(tensor: tensor_pb2.Tensor, count: int, payloads: Payloads | None) -> Places:
    """Returns the places of a sparse tensor of so many; raises `TensorError` where they are none."""
    dtype, shape = layout(tensor)
    if dtype not in {_INT32, _INT64} or len(shape) != 1:
        _refuse(f"places are {dtype.name} {list(shape)}, want int32 or int64 [P]", "INVALID_TENSOR")
    places = array_of(tensor.inline if payloads is None else payloads.get(tensor.inline), dtype, shape)
    if not len(places):
        return places
    if not (places[0] >= 0 and places[-1] < count):
        _refuse(f"places are {places[0]} to {places[-1]}, want 0..{count - 1}", "INVALID_TENSOR")
    if (places[1:] <= places[:-1]).any():
        _refuse("places are not in order", "INVALID_TENSOR")
    return places


def _place_type(shape: Sequence[int]) -> np.dtype[Any]:
    batch, _, height, width = shape
    return _INT32 if batch * height * width <= 2**31 else _INT64


def _refuse(message: str, reason: str) -> None:
    raise TensorError(reason, f"sparse tensor: {message}")
