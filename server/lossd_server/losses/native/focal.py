"""The compiled focal kernel, called with tensors."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from lossd_server.kernels import loaded_library
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.native.numbers import FLOAT_TYPES, address, thread_count

_SMALL = 1 << 16
"""Logits below which another thread costs more than it saves."""

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
        ("stray", ctypes.c_int32),
        ("loss", ctypes.c_double),
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
    library = loaded_library()
    if library is None or not constants.has_kernel or not all(map(_applies, grids)):
        return None
    problems = (_Grid * len(grids))(*map(_problem, grids))
    threads = thread_count(sum(grid.logits.numel() for grid in grids), _SMALL)
    if library.lossd_focal(problems, len(grids), ctypes.byref(_weights(constants)), threads):
        raise MemoryError
    losses = np.array([problem.loss for problem in problems])
    return FocalSums(losses=losses, finite=not any(problem.stray for problem in problems))


def _applies(grid: FocalGrid) -> bool:
    logits, gradient, ignored, rows = grid.logits, grid.gradient, grid.ignored, grid.rows
    return (
        logits.device.type == "cpu"
        and logits.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and grid.labels.stride(1) == 1
        and (ignored is None or ignored.stride(1) == 1)
        and (rows is None or rows.is_contiguous())
    )


@lru_cache
def _weights(constants: FocalConstants) -> _Constants:
    return _Constants(constants.negative_weight, constants.positive_weight, int(constants.gamma))


def _problem(grid: FocalGrid) -> _Grid:
    """Returns the grid in the kernel's terms; it points into the tensors."""
    logits, labels = grid.logits, grid.labels
    gradient = logits if grid.gradient is None else grid.gradient
    return _Grid(
        logits.data_ptr(),
        address(grid.gradient),
        labels.data_ptr(),
        address(grid.ignored),
        address(grid.rows),
        *logits.shape,
        *logits.stride(),
        *gradient.stride(),
        labels.stride(0),
        0 if grid.ignored is None else grid.ignored.stride(0),
        grid.scale,
        FLOAT_TYPES[logits.dtype],
        FLOAT_TYPES[gradient.dtype],
        _LABEL_TYPES[labels.dtype],
        grid.background,
    )
