"""The compiled focal kernel, called with tensors."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid
from lossd_server.losses.native.library import loaded_library

_CELLS_OF_TASK = 1024
"""As in focal.c."""

_LARGEST_GAMMA = 4

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types that the kernel reads and writes, by its numbers for them."""


class _Grid(ctypes.Structure):
    """`focal_grid` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "gradient", "labels", "ignored", "rows", "sums")),
        *((name, ctypes.c_int64) for name in ("batch", "classes", "cells")),
        *((f"logits_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        *((f"gradient_{name}_stride", ctypes.c_int64) for name in ("batch", "class", "cell")),
        *((f"{name}_batch_stride", ctypes.c_int64) for name in ("labels", "ignored")),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("logits_type", "gradient_type", "background")),
    )


class _Constants(ctypes.Structure):
    """`focal_constants` of focal.c."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("negative_weight", "positive_weight")),
        ("gamma", ctypes.c_int32),
    )


def focal_sums_natively(grids: Sequence[FocalGrid], constants: FocalConstants) -> Tensor | None:
    """Returns what `focal_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, for every type but float64 and for whole gammas up to 4.
    """
    library = loaded_library()
    if library is None or constants.gamma not in range(_LARGEST_GAMMA + 1) or not all(map(_applies, grids)):
        return None
    sums = [np.empty(_task_count(grid)) for grid in grids]
    problems = (_Grid * len(grids))(*map(_problem, grids, sums))
    small = sum(grid.logits.numel() for grid in grids) < _SMALL
    threads = 1 if small else torch.get_num_threads()
    library.lossd_focal(problems, len(grids), ctypes.byref(_weights(constants)), threads)
    return torch.from_numpy(np.array([part.sum() for part in sums]))


def _applies(grid: FocalGrid) -> bool:
    logits, gradient, ignored, rows = grid.logits, grid.gradient, grid.ignored, grid.rows
    return (
        logits.device.type == "cpu"
        and logits.dtype in _TYPES
        and (gradient is None or gradient.dtype in _TYPES)
        and grid.labels.stride(1) == 1
        and (ignored is None or ignored.stride(1) == 1)
        and (rows is None or rows.is_contiguous())
    )


@lru_cache
def _weights(constants: FocalConstants) -> _Constants:
    return _Constants(constants.negative_weight, constants.positive_weight, int(constants.gamma))


def _task_count(grid: FocalGrid) -> int:
    images, cells = grid.labels.shape
    return images * -(-cells // _CELLS_OF_TASK)


def _problem(grid: FocalGrid, sums: NDArray[np.float64]) -> _Grid:
    """Returns the grid in the kernel's terms; it points into the tensors."""
    logits, labels = grid.logits, grid.labels
    gradient = logits if grid.gradient is None else grid.gradient
    return _Grid(
        logits.data_ptr(),
        _address(grid.gradient),
        labels.data_ptr(),
        _address(grid.ignored),
        _address(grid.rows),
        sums.ctypes.data,
        *logits.shape,
        *logits.stride(),
        *gradient.stride(),
        labels.stride(0),
        0 if grid.ignored is None else grid.ignored.stride(0),
        _address(grid.scale),
        _TYPES[logits.dtype],
        _TYPES[gradient.dtype],
        grid.background,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
