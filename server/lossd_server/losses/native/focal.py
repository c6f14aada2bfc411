"""The compiled focal kernel, called with tensors."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossd_server.kernels import address_of, loaded_library
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.native.numbers import FLOAT_TYPES, address, thread_count

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

_MAP, _ROWS = 4, 3
"""Dimensions of logits: `[B, C, H, W]` and `[B, C, S]`; `[N, C]` has two."""

_LABEL_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int16: 2,
    torch.uint16: 3,
    torch.int32: 4,
    torch.uint32: 4,
    torch.int64: 5,
    torch.uint64: 5,
}
"""Types of labels, by their numbers in focal.c."""


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
        and logits.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and (grid.rows is None or grid.rows.is_contiguous())
    )


def _lies_in_rows(grid: FocalGrid) -> bool:
    """Whether the locations of each image lie at one distance from each other, as the kernel wants them."""
    return (
        _is_a_map_of_rows(grid.logits)
        and (grid.gradient is None or _is_a_map_of_rows(grid.gradient))
        and _is_row_by_row(grid.labels)
        and (grid.ignored is None or _is_row_by_row(grid.ignored))
    )


def _is_a_map_of_rows(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return len(strides) < _MAP or strides[2] == tensor.shape[3] * strides[3]


def _is_row_by_row(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1)


def _problem(grid: FocalGrid) -> _Grid:
    """Returns the grid in the kernel's terms; it points into the tensors."""
    logits, gradient, labels, ignored = grid.logits, grid.gradient, grid.labels, grid.ignored
    shape, strides = _extents(logits), _strides(logits)
    return _Grid(
        logits.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        labels.data_ptr(),
        address(ignored),
        address(grid.rows),
        *shape,
        *strides,
        *(strides if gradient is None else _strides(gradient)),
        labels.stride(0) if labels.dim() == 2 else shape[2],
        0 if ignored is None else ignored.stride(0) if ignored.dim() == 2 else shape[2],
        grid.scale,
        FLOAT_TYPES[logits.dtype],
        FLOAT_TYPES[logits.dtype if gradient is None else gradient.dtype],
        _LABEL_TYPES[labels.dtype],
        grid.background,
    )


def _extents(tensor: Tensor) -> Sequence[int]:
    """Returns images, classes and locations."""
    shape = tensor.shape
    if len(shape) == _MAP:
        return shape[0], shape[1], shape[2] * shape[3]
    return shape if len(shape) == _ROWS else (1, shape[1], shape[0])


def _strides(tensor: Tensor) -> Sequence[int]:
    """Returns the distances of neighbouring images, classes and locations."""
    strides = tensor.stride()
    if len(strides) == _MAP:
        return strides[0], strides[1], strides[3]
    return strides if len(strides) == _ROWS else (0, strides[1], strides[0])
