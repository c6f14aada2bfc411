"""What a `Tensor` means: its types and shapes, and the numpy array that it holds.

Both sides use it, so that they cannot drift apart; what writes tensors into messages is `lossd.writing`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lossd.v1 import tensor_pb2 as pb
from lossd.wire import Buffer, Payloads

Array = NDArray[Any]

DTYPES: dict["pb.DataType.ValueType", np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_INT8: np.dtype("i1"),
    pb.DATA_TYPE_INT16: np.dtype("<i2"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
    pb.DATA_TYPE_UINT16: np.dtype("<u2"),
    pb.DATA_TYPE_UINT32: np.dtype("<u4"),
    pb.DATA_TYPE_UINT64: np.dtype("<u8"),
    pb.DATA_TYPE_BOOL: np.dtype("?"),
}
"""The numpy type of every element type of the contract, in the byte order of the wire."""

DATA_TYPES: dict[str, "pb.DataType.ValueType"] = {dtype.name: enum for enum, dtype in DTYPES.items()}
"""The contract's element type by numpy's name for it."""

_BY_DTYPE = {dtype: enum for enum, dtype in DTYPES.items()}  # numpy spells a name out every time it is asked

MAX_DIMENSIONS = 32
"""Most dimensions of a tensor; numpy holds 64, torch's CUDA kernels fewer."""

_MAX_BYTES = 2**62

_missing = set(pb.DataType.values()) - set(DTYPES) - {pb.DATA_TYPE_UNSPECIFIED}
if _missing:
    raise ImportError(f"no numpy type for {[pb.DataType.Name(value) for value in _missing]}")


class TensorError(ValueError):
    """A `Tensor` that means no array, or an array that no `Tensor` can hold.

    Attributes:
        reason: `INVALID_DTYPE`, `INVALID_SHAPE` or `INVALID_TENSOR`, as in the contract's `ErrorReason`.
        values: Every value that the message mentions, by name.
    """

    def __init__(self, reason: str, message: str, **values: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.values = {name: str(value) for name, value in values.items()}


def pack(array: Array) -> pb.Tensor:
    """Returns what `lossd.writing.tensor_field` writes of an array as stock protobuf has it, by a copy.

    Raises:
        TensorError: The dtype is not one of the contract's, or there are too many dimensions.
    """
    data_type = data_type_of(array.dtype)
    check_dimensions(array.shape)
    elements = array.astype(DTYPES[data_type], copy=False).tobytes()
    return pb.Tensor(dtype=data_type, shape=array.shape, inline=elements)


def unpack(tensor: pb.Tensor, payloads: Payloads | None = None) -> Array:
    """Returns the read-only array that `tensor` holds: a view of the received bytes where they are aligned.

    Args:
        tensor: The tensor.
        payloads: Those of the message that it came in.

    Raises:
        TensorError: The type is unknown, an extent is negative, the storage is not exactly as long
            as shape and type say, or a bool is neither 0 nor 1.
    """
    return array_of(tensor.inline if payloads is None else payloads.get(tensor.inline), *layout(tensor))


def array_of(data: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Returns the array of a type and shape that bytes hold; see `unpack`."""
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise TensorError(
            "INVALID_TENSOR",
            f"storage is {len(data)} bytes, want {expected} for {dtype.name} {list(shape)}",
            length=len(data),
            expected=expected,
            dtype=dtype.name,
            shape=list(shape),
        )
    array: Array = np.ndarray(shape, dtype, data)
    if dtype.kind == "b":
        check_bools(array)
    return aligned(array)


def layout(tensor: pb.Tensor) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Returns the type and shape of a tensor, wherever its elements lie.

    Raises:
        TensorError: The type is unknown, an extent is negative, or the shape is too large.
    """
    return _layout(tensor.dtype, tuple(tensor.shape))


@lru_cache(maxsize=1024)
def _layout(
    data_type: "pb.DataType.ValueType", shape: tuple[int, ...]
) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Returns the type and shape, checked when they first come."""
    dtype = DTYPES.get(data_type)
    if dtype is None:
        known = ", ".join(sorted(DATA_TYPES))
        raise TensorError("INVALID_DTYPE", f"dtype is {data_type}, want one of {known}", dtype=data_type)
    _check_shape(shape)
    return dtype, shape


def data_type_of(dtype: np.dtype[Any]) -> "pb.DataType.ValueType":
    """Returns the contract's type for a numpy dtype of either byte order.

    Raises:
        TensorError: The contract has none.
    """
    data_type = _BY_DTYPE.get(dtype) or DATA_TYPES.get(dtype.name)
    if data_type is None:
        known = ", ".join(sorted(DATA_TYPES))
        raise TensorError("INVALID_DTYPE", f"dtype is {dtype}, want one of {known}", dtype=dtype)
    return data_type


def check_dimensions(shape: Sequence[int]) -> None:
    """Raises `TensorError` where a shape has more dimensions than are allowed."""
    if len(shape) > MAX_DIMENSIONS:
        raise TensorError(
            "INVALID_SHAPE",
            f"shape has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed",
            dimensions=len(shape),
        )


def _check_shape(shape: Sequence[int]) -> None:
    check_dimensions(shape)
    if min(shape, default=1) > 0 and math.prod(shape) <= _MAX_BYTES // 8:
        return
    size = 8
    for axis, extent in enumerate(shape):
        if extent < 0:
            raise TensorError(
                "INVALID_SHAPE",
                f"shape[{axis}] is {extent}, want at least 0",
                axis=axis,
                extent=extent,
            )
        size *= extent or 1  # zero extents hide the others from the product, but not from numpy
    if size > _MAX_BYTES:
        raise TensorError("INVALID_SHAPE", f"shape {list(shape)} is too large", shape=list(shape))


def aligned(array: Array) -> Array:
    """Returns an array if its elements lie as the processor wants them, or a copy whose elements do.

    Torch and compiled kernels may not be given other memory. A copy of 51 MB takes 4 ms.
    """
    if array.flags.aligned:
        return array
    array = array.copy()
    array.flags.writeable = False
    return array


def check_bools(array: Array) -> None:
    """Raises `TensorError` where an array of bools holds a byte that is neither 0 nor 1."""
    if array.dtype.kind != "b":
        return
    flat = array.reshape(-1).view(np.uint8)
    stray = flat > 1
    if stray.any():
        position = int(stray.argmax())
        raise TensorError(
            "INVALID_TENSOR",
            f"bool element {position} is {flat[position]}, want 0 or 1",
            position=position,
            value=flat[position],
        )
