"""Tensors, and arrays of numpy where there is no need of tensors, seen alike."""

import math
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.kernels import address_of

A = TypeVar("A", Tensor, NDArray[Any])
"""Tensors of one device, or arrays of numpy: never some of these and some of those."""

FLOAT32 = frozenset({np.dtype(np.float32)})


class Form(NamedTuple):
    """All that is to be known of an array but where it lies, and what it holds.

    Attributes:
        shape: Extents.
        steps: How far neighbours along each axis are apart.
        unit: An element, as `steps` counts.
        dtype: Type of the elements, numpy's or torch's.
        is_on_host: Whether the host's compiled kernels can read it.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    unit: int
    dtype: Any
    is_on_host: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """How many elements neighbours along each axis are apart."""
        return tuple(step // self.unit for step in self.steps)

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie in order and without gaps."""
        size = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent > 1 and stride != size and 0 not in self.shape:
                return False
            size *= extent
        return True


def form_of(array: Tensor | NDArray[Any] | None) -> Form | None:
    """Returns the form of an array; None where there is nothing."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return Form(array.shape, array.strides, array.itemsize, array.dtype, is_on_host=True)
    return Form(array.shape, array.stride(), 1, array.dtype, array.is_cpu)


def address(array: Tensor | NDArray[Any] | None) -> int:
    """Returns where the elements begin; 0, the null pointer, where there is nothing."""
    if array is None:
        return 0
    return address_of(array) if isinstance(array, np.ndarray) else array.data_ptr()


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
