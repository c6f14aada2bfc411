"""Integers in fewer bytes, wherever they fit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST_BYTES = 16 << 10
"""Fewer are sent sooner than they are looked at."""

_TYPES = [(dtype, np.iinfo(dtype).min, np.iinfo(dtype).max) for dtype in (np.dtype("i1"), np.dtype("<i2"))]
"""Smaller types, and what they hold."""


def narrowed_integers(array: Array) -> Array:
    """Returns integers in the smallest signed type that holds them all; anything else as it is."""
    if not type_depends_on_values(array.dtype, array.nbytes):
        return array
    lowest, highest = array.min(), array.max()
    for dtype, least, most in _TYPES:
        if dtype.itemsize < array.itemsize and least <= lowest and highest <= most:
            return array.astype(dtype)
    return array


def type_depends_on_values(dtype: np.dtype[Any], size: int) -> bool:
    """Returns whether it depends on the elements of an array of so many bytes in what type they are sent."""
    return dtype.kind == "i" and size >= _LEAST_BYTES
