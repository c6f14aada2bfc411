"""The compiled focal kernel, called with tensors or arrays."""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.kernels import address_of, loaded_library
from lossd_server.losses.arrays import A, address, is_dense, is_on_host, strides_of
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.native.numbers import FLOAT_TYPES, thread_count

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

LABEL_TYPES = {
    dtype: number
    for number, names in enumerate(
        (("int8",), ("uint8",), ("int16",), ("uint16",), ("int32", "uint32"), ("int64", "uint64"))
    )
    for name in names
    for dtype in (np.dtype(name), getattr(torch, name))
}
"""Types of labels, numpy's and torch's, by their numbers in focal.c."""

_MATRIX = 2


class _Grid(ctypes.Structure):
    """`focal_grid` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "gradient", "labels", "ignored", "rows")),
        *((name, ctypes.c_int64) for name in ("batch", "classes", "cells")),
        *((f"logits_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        *((f"gradient_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        *((f"{name}_batch_stride", ctypes.c_int64) for name in ("labels", "ignored")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("logits_type", "gradient_type", "labels_type", "background")),
    )


class _Constants(ctypes.Structure):
    """`focal_constants` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("negative_weight", "positive_weight")),
        ("gamma", ctypes.c_int32),
    )


def focal_sums_natively(grids: Sequence[FocalGrid[A]], constants: FocalConstants) -> FocalSums | None:
    """Returns what `focal_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, for every type but float64, for whole gammas up to 4, and where the locations of
    each image lie at one distance from each other.
    """
    library, weights = loaded_library(), _weights(constants)
    if library is None or weights is None or not all(map(_applies, grids)):
        return None
    found = [problem for grid in grids if (problem := _problem(grid)) is not None]
    if len(found) < len(grids):
        return None
    problems = (_Grid * len(grids))(*found)
    threads = thread_count(sum(math.prod(grid.logits.shape) for grid in grids), _SMALL)
    losses = np.empty(len(grids))
    stray = library.lossd_focal(problems, len(grids), weights, threads, address_of(losses))
    if stray < 0:
        raise MemoryError
    return FocalSums(losses=losses, finite=not stray)


@lru_cache
def _weights(constants: FocalConstants) -> Any:
    """Returns the constants in the kernel's terms, None where it does not know the gamma."""
    if not constants.has_kernel:
        return None
    weights = constants.negative_weight, constants.positive_weight
    return ctypes.byref(_Constants(*weights, int(constants.gamma)))


def _applies(grid: FocalGrid[A]) -> bool:
    logits, gradient = grid.logits, grid.gradient
    return (
        is_on_host(logits)
        and is_on_host(grid.labels)
        and logits.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and (grid.rows is None or is_dense(grid.rows))
    )


def _problem(grid: FocalGrid[A]) -> _Grid | None:
    """Returns the grid in the kernel's terms, which points into the arrays; None where it has none."""
    logits, gradient = grid.logits, grid.gradient
    layout = _layout_of(logits)
    like = layout if gradient is None else _layout_of(gradient)
    if layout is None or like is None:
        return None
    labels_stride, ignored_stride = _row_stride(grid.labels, layout), _row_stride(grid.ignored, layout)
    if labels_stride is None or ignored_stride is None:
        return None
    return _Grid(
        address(logits),
        address(gradient),
        address(grid.labels),
        address(grid.ignored),
        address(grid.rows),
        *layout.extents,
        *layout.strides,
        *like.strides,
        labels_stride,
        ignored_stride,
        grid.scale,
        FLOAT_TYPES[logits.dtype],
        FLOAT_TYPES[logits.dtype if gradient is None else gradient.dtype],
        LABEL_TYPES[grid.labels.dtype],
        grid.background,
    )


class _Layout(NamedTuple):
    """How many images, classes and locations there are, and how far neighbours of each are apart."""

    extents: tuple[int, int, int]
    strides: tuple[int, int, int]


def _row_stride(array: Tensor | NDArray[Any] | None, layout: _Layout) -> int | None:
    """Returns how far the locations of one image are from those of the next; None where they have no row."""
    if array is None:
        return 0
    if is_dense(array):
        return layout.extents[2]
    strides = strides_of(array)
    return strides[0] if array.ndim == _MATRIX and strides[1] == 1 else None


def _layout_of(array: Tensor | NDArray[Any]) -> _Layout | None:
    """Returns the `_Layout` of logits, or None: see `_layout`, which knows those that it has met."""
    return _layout(array.shape, strides_of(array))


@lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Layout | None:
    """Returns the layout of logits of so many dimensions; None where locations are not at one distance."""
    match shape, strides:
        case (cells, classes), (cell, each_class):
            return _Layout((1, classes, cells), (0, each_class, cell))
        case (batch, classes, cells), (image, each_class, cell):
            return _Layout((batch, classes, cells), (image, each_class, cell))
        case (batch, classes, height, width), (image, each_class, down, across) if down == width * across:
            return _Layout((batch, classes, height * width), (image, each_class, across))
    return None
