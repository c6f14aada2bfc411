"""Tensors, and arrays of numpy where there is no need of tensors, seen alike."""

import math
from collections.abc import Container, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.kernels import address_of

A = TypeVar("A", Tensor, NDArray[Any])
"""Tensors of one device, or arrays of numpy: never some of these and some of those."""

FLOAT32 = frozenset({np.dtype(np.float32)})


def address(array: Tensor | NDArray[Any] | None) -> int:
    """Returns where the elements begin; 0, the null pointer, where there is nothing."""
    if array is None:
        return 0
    return address_of(array) if isinstance(array, np.ndarray) else array.data_ptr()


def strides_of(array: Tensor | NDArray[Any]) -> tuple[int, ...]:
    """Returns how many elements neighbours along each axis are apart."""
    return _in_elements(array.strides, array.itemsize) if isinstance(array, np.ndarray) else array.stride()


def is_on_host(array: Tensor | NDArray[Any]) -> bool:
    """Whether the host's compiled kernels can read it."""
    return isinstance(array, np.ndarray) or array.is_cpu


def is_dense(array: Tensor | NDArray[Any]) -> bool:
    """Whether the elements lie in order and without gaps."""
    return array.flags.c_contiguous if isinstance(array, np.ndarray) else array.is_contiguous()


def are_plain(types: Container[Any], *arrays: Any) -> bool:
    """Whether all are arrays of numpy, of certain types, whose elements lie in order and without gaps."""
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.dtype not in types:
            return False
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned):
            return False
    return True


def are_places(places: Sequence[Any], likes: Sequence[NDArray[np.float32]]) -> bool:
    """Whether the gradients of float32 arrays can be written to places: plain ones of the same shapes."""
    for place, like in zip(places, likes, strict=True):
        if not isinstance(place, np.ndarray) or place.dtype not in FLOAT32 or place.shape != like.shape:
            return False
        if not place.flags.carray:  # in order, aligned, and to be written to
            return False
    return True


def in_rows(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array whose last axis is dense, which may be the one that came."""
    return np.ascontiguousarray(array) if array.ndim and array.strides[-1] != array.itemsize else array


def are_finite(*arrays: NDArray[Any]) -> bool:
    """Whether arrays hold neither NaN nor infinity; large numbers may look like some."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(np.add.reduce(array, axis=None)) for array in arrays)


@lru_cache(maxsize=1024)
def _in_elements(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(stride // itemsize for stride in strides)
