"""Messages that hold tensors, written by hand: heads are made, and one copy gathers them and the elements.

A message is a list of pieces, its bytes in order. What stock protobuf writes is a piece too, since the
fields of a message may come in any order. Large elements begin where a reader can use them as they lie: the
number in front of them, `Tensor.dtype`, is written in up to three bytes more than it needs. It comes once
more behind them, in so many bytes that a tensor is as long wherever it lies. Every reader of protobuf takes
both.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from lossd.tensors import DTYPES, Array, check_dimensions, data_type_of
from lossd.v1 import tensor_pb2 as pb
from lossd.varints import varint
from lossd.wire import LARGE_BYTES, Buffer

_VIEWED_BYTES = 4 << 10
"""Fewer are copied before they are gathered: that is sooner than to view them."""

ALIGNMENT = 4
"""Where large elements begin, a multiple of it: as float32 wants. More would take a varint of over five
bytes, which not every reader of an enum takes."""


def _tag(number: int) -> bytes:
    return varint(number << 3 | 2)


def _dtype(data_type: int, padding: int = 0) -> bytes:
    """Returns the field `Tensor.dtype` in so many bytes more than it needs, 3 at most."""
    if not padding:
        return _DTYPE_TAG + varint(data_type)
    return _DTYPE_TAG + bytes([data_type | 0x80, *[0x80] * (padding - 1), 0])


_DTYPE_TAG = varint(pb.Tensor.DTYPE_FIELD_NUMBER << 3)
_INLINE_TAG = _tag(pb.Tensor.INLINE_FIELD_NUMBER)


class LargeTensor:
    """A tensor in a field of a message, whose place there decides what is before and behind its elements.

    Args:
        tag: The tag of the field.
        array: The elements, in a type of the contract and in C order. Left as they are until the message
            is written.
    """

    __slots__ = ("_about", "_data_type", "_elements", "_size", "_start")

    def __init__(self, tag: bytes, array: Array) -> None:
        self._data_type = data_type_of(array.dtype)
        self._elements = _bytes_of(array)
        self._about = pb.Tensor(shape=array.shape).SerializeToString() + _INLINE_TAG + varint(array.nbytes)
        size = 2 * len(_dtype(self._data_type)) + ALIGNMENT - 1 + len(self._about) + array.nbytes
        self._start = tag + varint(size)
        self._size = len(self._start) + size

    def __len__(self) -> int:
        return self._size

    def pieces(self, at: int) -> list[Buffer]:
        """Returns its bytes, of which the first lies at some place in the message."""
        before = at + len(self._start) + len(_dtype(self._data_type)) + len(self._about)
        padding = -before % ALIGNMENT
        head = self._start + _dtype(self._data_type, padding) + self._about
        return [head, self._elements, _dtype(self._data_type, ALIGNMENT - 1 - padding)]


Piece: TypeAlias = Buffer | LargeTensor


@lru_cache(maxsize=64)
def tags_of(descriptor: Any) -> dict[str, bytes]:
    """Returns the tags of the fields of a message type by name, as those of strings and messages are."""
    return {field.name: _tag(field.number) for field in descriptor.fields}


def size_of(pieces: Iterable[Piece]) -> int:
    """Returns how many bytes pieces come to."""
    return sum(map(len, pieces))


def message_field(tag: bytes, pieces: Sequence[Piece]) -> list[Piece]:
    """Returns a message as a field of another.

    Args:
        tag: The tag of the field.
        pieces: The message.
    """
    return [message_head(tag, size_of(pieces)), *pieces]


def message_head(tag: bytes, size: int) -> bytes:
    """Returns what comes before a message of so many bytes in a field of another."""
    return tag + varint(size)


def tensor_field(tag: bytes, array: Array) -> list[Piece]:
    """Returns the `Tensor` that holds an array, whatever its strides and byte order, as a field of a message.

    Args:
        tag: The tag of the field.
        array: Left as it is until the message is written.

    Raises:
        TensorError: The dtype is not one of the contract's, or there are too many dimensions.
    """
    head, dtype = _head(tag, array.dtype, array.shape)
    if array.dtype is not dtype:
        array = array.astype(dtype, copy=False)
    return [head, elements_of(array)] if array.nbytes < LARGE_BYTES else [LargeTensor(tag, array)]


def tensor_head(tag: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], padding: int = 0) -> bytes:
    """Returns what comes before the elements of a tensor that is not large, as `tensor_field` has it.

    Args:
        tag: The tag of the field.
        dtype: The type of the elements.
        shape: The shape of the tensor.
        padding: How many bytes more it is to take, 3 at most.

    Raises:
        TensorError: The dtype is not one of the contract's, or there are too many dimensions.
    """
    return _head(tag, dtype, shape, padding)[0]


def elements_of(array: Array) -> Buffer:
    """Returns the elements of an array of a type of the contract, in C order, as `tensor_field` has them."""
    return np.asarray(array).tobytes() if array.nbytes < _VIEWED_BYTES else _bytes_of(array)


@lru_cache(maxsize=4096)
def shared_tensor_field(
    tag: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], region_id: bytes, offset: int
) -> bytes:
    """Returns the `Tensor` of an array which lies in a shared region, as a field of a message.

    Args:
        tag: The tag of the field.
        dtype: The type of the array.
        shape: Its shape.
        region_id: The region.
        offset: Where in the region it begins, in bytes.

    Raises:
        TensorError: The dtype is not one of the contract's, or there are too many dimensions.
    """
    check_dimensions(shape)
    place = pb.SharedSlice(region_id=region_id, offset=offset)
    held = pb.Tensor(dtype=data_type_of(dtype), shape=shape, shared=place).SerializeToString()
    return message_head(tag, len(held)) + held


def placed(pieces: Sequence[Piece]) -> list[Buffer]:
    """Returns the bytes of a whole message, in pieces that may refer to the arrays in it."""
    if size_of(pieces) < LARGE_BYTES:
        return [*pieces]  # type: ignore[list-item]  # nothing of it is large
    found: list[Buffer] = []
    at = 0
    for piece in pieces:
        if isinstance(piece, LargeTensor):
            found += piece.pieces(at)
        else:
            found.append(piece)
        at += len(piece)
    return found


@lru_cache(maxsize=4096)
def _head(
    tag: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], padding: int = 0
) -> tuple[bytes, np.dtype[Any]]:
    """Returns what comes before the elements of a tensor in a field, and their type on the wire."""
    check_dimensions(shape)
    data_type = data_type_of(dtype)
    size = math.prod(shape) * dtype.itemsize
    about = (
        _dtype(data_type, padding) + pb.Tensor(shape=shape).SerializeToString() + _INLINE_TAG + varint(size)
    )
    return tag + varint(len(about) + size) + about, DTYPES[data_type]


def _bytes_of(array: Array) -> memoryview:
    """Returns the elements of an array: as they lie where they are in order, and in a copy if not."""
    if not array.nbytes:
        return memoryview(b"")
    array = np.ascontiguousarray(array)
    if array.dtype.kind == "V":  # which numpy does not export
        array = array.view(f"u{array.itemsize}")
    return array.data.cast("B")
