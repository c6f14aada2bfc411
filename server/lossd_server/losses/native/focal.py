"""The compiled focal kernel, called with tensors, or with arrays where they are plain ones."""

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
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.native.numbers import FLOAT_TYPES, address, thread_count

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

_LABEL_TYPES = {
    dtype: number
    for number, names in enumerate(
        (("int8",), ("uint8",), ("int16",), ("uint16",), ("int32", "uint32"), ("int64", "uint64"))
    )
    for name in names
    for dtype in (np.dtype(name), getattr(torch, name))
}
"""Types of labels, numpy's and torch's, by their numbers in focal.c."""

_FLOAT32 = np.dtype(np.float32)
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


def focal_sums_natively(grids: Sequence[FocalGrid], constants: FocalConstants) -> FocalSums | None:
    """Returns what `focal_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, for every type but float64 and for whole gammas up to 4.
    """
    library, weights = loaded_library(), _weights(constants)
    if library is None or weights is None or not all(map(_applies, grids)):
        return None
    grids = [grid if _lies_in_rows(grid) else grid.flat() for grid in grids]
    problems = (_Grid * len(grids))(*map(_problem, grids))
    threads = thread_count(sum(grid.logits.numel() for grid in grids), _SMALL)
    losses = np.empty(len(grids))
    stray = library.lossd_focal(problems, len(grids), weights, threads, address_of(losses))
    if stray < 0:
        raise MemoryError
    return FocalSums(losses=losses, finite=not stray)


def are_plain(logits: Any, labels: Any) -> bool:
    """Whether `focal_sum_of_arrays` takes logits and labels: float32 and integers of numpy, without gaps."""
    return (
        isinstance(logits, np.ndarray)
        and isinstance(labels, np.ndarray)
        and logits.dtype == _FLOAT32
        and labels.dtype in _LABEL_TYPES
        # Those of an extent of 1 as well: by them the kernel decides in which order it adds.
        and logits.strides == _dense_layout(logits.shape).byte_strides
        and labels.flags.c_contiguous
        and logits.size > 0
    )


def are_alike(gradient: NDArray[Any], logits: NDArray[np.float32]) -> bool:
    """Whether an array lies as the logits do, whose gradient it is to hold."""
    return gradient.dtype == logits.dtype and gradient.strides == logits.strides


def focal_sum_of_arrays(
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    gradient: NDArray[np.float32] | None,
    scale: float,
    constants: FocalConstants,
) -> float | None:
    """Returns the summed focal loss of plain arrays, and writes its gradient.

    Args:
        logits: `[N, C]` or `[N, C, H, W]`.
        labels: `[N]` or `[N, H, W]`, 0..C-1, or negative for a row that takes no part.
        gradient: As the logits, written with `scale · ∂loss/∂logit`; None if not wanted.
        scale: What the gradient is multiplied by.
        constants: The constants of the loss.

    Returns:
        None where a logit is not finite, or there is no kernel.
    """
    library, weights = loaded_library(), _weights(constants)
    if library is None or weights is None:
        return None
    layout = _dense_layout(logits.shape).layout
    grid = _Grid(
        address_of(logits),
        None if gradient is None else address_of(gradient),
        address_of(labels),
        None,
        None,
        *layout.extents,
        *layout.strides,
        *layout.strides,
        layout.extents[2],
        0,
        scale,
        FLOAT_TYPES[torch.float32],
        FLOAT_TYPES[torch.float32],
        _LABEL_TYPES[labels.dtype],
    )
    total = ctypes.c_double()
    threads = thread_count(logits.size, _SMALL)
    stray = library.lossd_focal(ctypes.byref(grid), 1, weights, threads, ctypes.addressof(total))
    if stray < 0:
        raise MemoryError
    return None if stray else total.value


@lru_cache
def _weights(constants: FocalConstants) -> Any:
    """Returns the constants in the kernel's terms, None where it does not know the gamma."""
    if not constants.has_kernel:
        return None
    weights = constants.negative_weight, constants.positive_weight
    return ctypes.byref(_Constants(*weights, int(constants.gamma)))


def _applies(grid: FocalGrid) -> bool:
    logits, gradient = grid.logits, grid.gradient
    return (
        logits.is_cpu
        and grid.labels.is_cpu
        and logits.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and (grid.rows is None or grid.rows.is_contiguous())
    )


def _lies_in_rows(grid: FocalGrid) -> bool:
    """Whether the locations of each image lie at one distance from each other, as the kernel wants them."""
    return (
        _layout_of(grid.logits) is not None
        and (grid.gradient is None or _layout_of(grid.gradient) is not None)
        and _is_row_by_row(grid.labels)
        and (grid.ignored is None or _is_row_by_row(grid.ignored))
    )


def _is_row_by_row(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1)


def _problem(grid: FocalGrid) -> _Grid:
    """Returns the grid in the kernel's terms; it points into the tensors."""
    logits, gradient, labels, ignored = grid.logits, grid.gradient, grid.labels, grid.ignored
    layout = _layout_of(logits)
    return _Grid(
        logits.data_ptr(),
        address(gradient),
        labels.data_ptr(),
        address(ignored),
        address(grid.rows),
        *layout.extents,
        *layout.strides,
        *(layout if gradient is None else _layout_of(gradient)).strides,
        labels.stride(0) if labels.dim() == 2 else layout.extents[2],
        0 if ignored is None else ignored.stride(0) if ignored.dim() == 2 else layout.extents[2],
        grid.scale,
        FLOAT_TYPES[logits.dtype],
        FLOAT_TYPES[logits.dtype if gradient is None else gradient.dtype],
        _LABEL_TYPES[labels.dtype],
        grid.background,
    )


class _Layout(NamedTuple):
    """How many images, classes and locations there are, and how far neighbours of each are apart."""

    extents: tuple[int, int, int]
    strides: tuple[int, int, int]


def _layout_of(tensor: Tensor) -> Any:
    """Returns the `_Layout` of a tensor, or None: see `_layout`, which knows those that it has met."""
    return _layout(tensor.shape, tensor.stride())


class _DenseLayout(NamedTuple):
    """The `_Layout` of float32 logits without gaps, and their strides in bytes, as numpy has them."""

    layout: _Layout
    byte_strides: tuple[int, ...]


@lru_cache(maxsize=1024)
def _dense_layout(shape: tuple[int, ...]) -> _DenseLayout:
    """Returns the layout of logits `[N, C]` or `[N, C, H, W]`."""
    if len(shape) == _MATRIX:
        layout = _Layout((1, shape[1], shape[0]), (0, 1, shape[1]))
    else:
        batch, classes, cells = shape[0], shape[1], math.prod(shape[2:])
        layout = _Layout((batch, classes, cells), (classes * cells, cells, 1))
    strides = (_FLOAT32.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _DenseLayout(layout, tuple(strides))


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
