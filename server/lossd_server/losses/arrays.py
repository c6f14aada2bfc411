"""Tensors, and arrays of numpy where there is no need of tensors, seen alike."""

import math
from collections.abc import Container, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.kernels import address_of

A = TypeVar("A", Tensor, NDArray[Any])
"""Tensors of one device, or arrays of numpy: never some of these and some of those."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

NARROW_FLOATS = frozenset({np.dtype(np.float32), np.dtype(np.float16), _BFLOAT16})
"""Floats of at most 32 bits: the types of predictions that are evaluated as arrays."""

_GRADIENTS = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _BFLOAT16,
}

PLAIN_GRADIENTS = frozenset({None, *_GRADIENTS})
"""Types that their gradients may be wanted in; None is that of the prediction."""

_EXPONENTS = {np.dtype(np.float16): 0x7C00, _BFLOAT16: 0x7F80}
"""The bits of a half-precision number that are all set in NaN and infinity, and in no other."""


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


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Returns the very memory of a tensor of the host's as an array, bfloat16 in the type of `ml_dtypes`."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(_BFLOAT16)
    array: NDArray[Any] = tensor.numpy()
    return array


def gradient_dtype(prediction: np.dtype[Any], wanted: torch.dtype | None) -> np.dtype[Any]:
    """Returns the type of the gradient of such a prediction, given which of `PLAIN_GRADIENTS` is wanted."""
    return prediction if wanted is None else _GRADIENTS[wanted]


def are_places(
    places: Sequence[Any], predictions: Sequence[NDArray[Any]], wanted: torch.dtype | None
) -> bool:
    """Whether gradients of predictions can be written to places: plain ones of their shapes, in some type."""
    if wanted not in PLAIN_GRADIENTS:
        return False
    for place, prediction in zip(places, predictions, strict=True):
        dtype = gradient_dtype(prediction.dtype, wanted)
        if not isinstance(place, np.ndarray) or place.dtype != dtype or place.shape != prediction.shape:
            return False
        if not place.flags.carray:  # in order, aligned, and to be written to
            return False
    return True


def in_rows(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array whose last axis is dense, which may be the one that came."""
    return np.ascontiguousarray(array) if array.ndim and array.strides[-1] != array.itemsize else array


def are_finite(*arrays: NDArray[Any]) -> bool:
    """Whether arrays hold neither NaN nor infinity; large numbers of wide types may look like some."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(map(_is_finite, arrays))


def non_finite(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns which elements are NaN or infinite."""
    exponent = _EXPONENTS.get(array.dtype)
    found: NDArray[np.bool_] = (
        ~np.isfinite(array) if exponent is None else (array.view(np.uint16) & exponent) == exponent
    )
    return found


def _is_finite(array: NDArray[Any]) -> bool:
    exponent = _EXPONENTS.get(array.dtype)
    if exponent is None:
        return math.isfinite(np.add.reduce(array, axis=None))
    return bool((array.view(np.uint16) & exponent).max(initial=0) < exponent)


@lru_cache(maxsize=1024)
def _in_elements(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(stride // itemsize for stride in strides)
