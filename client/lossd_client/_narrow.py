"""Predictions in fewer bytes, by the caller's choice."""

from typing import Any

import ml_dtypes
import numpy as np

from lossd.v1 import loss_service_pb2 as pb
from lossd_client._arrays import Array
from lossd_client._errors import refused_here

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_WIRE_TYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "bfloat16": BFLOAT16}

_LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127}
"""The largest number of each."""

_FLOATS = frozenset(map(np.dtype, ("f4", "f8")))
"""The types that are narrowed."""


def wire_type(dtype: Any) -> np.dtype[Any]:
    """Returns the type that predictions are to be sent in.

    Args:
        dtype: `float16` or `bfloat16`, as a name or as numpy's or torch's type.

    Raises:
        InvalidInputError: It is neither.
    """
    name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    if name not in _WIRE_TYPES:
        reason, allowed = pb.ERROR_REASON_INVALID_OPTION, " or ".join(_WIRE_TYPES)
        raise refused_here(reason, f"is {name}, want {allowed}", field="wire_dtype", value=name)
    return _WIRE_TYPES[name]


def narrowed(field: str, array: Array, dtype: np.dtype[Any] | None) -> Array:
    """Returns floating-point numbers rounded to a type of two bytes, NaN and infinity as they are.

    Args:
        field: What they are, for errors.
        array: The numbers. Those that are no wider, and what is not floating-point, are left alone.
        dtype: The type; None leaves them alone.

    Raises:
        InvalidInputError: A finite number is beyond the type. As infinity it would be another loss, and
            as the largest number that there is, one that nobody could tell from a right one.
    """
    if dtype is None or array.dtype not in _FLOATS:
        return array
    with np.errstate(over="ignore", under="ignore"):
        narrow = array.astype(dtype)
    limit = _LARGEST[dtype.name]
    if array.size and not (array.min() >= -limit and array.max() <= limit):
        _require_no_overflow(field, array, narrow)
    return narrow


def _require_no_overflow(field: str, array: Array, narrow: Array) -> None:
    stray = np.isinf(narrow) & np.isfinite(array)
    if not stray.any():
        return
    position = [int(index) for index in np.unravel_index(stray.argmax(), array.shape)]
    value, limit = float(array[tuple(position)]), _LARGEST[narrow.dtype.name]
    raise refused_here(
        pb.ERROR_REASON_VALUE_OUT_OF_RANGE,
        f"value at {position} is {value:g}, {narrow.dtype.name} holds at most {limit:g}",
        field=field,
        value=value,
        limit=limit,
        position=position,
        wire_dtype=narrow.dtype.name,
    )
