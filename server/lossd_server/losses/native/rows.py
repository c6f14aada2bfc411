"""The compiled kernel of row losses, called with tensors, or with arrays where they are plain ones."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lossd_server.kernels import address_of, loaded_library
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.native.numbers import FLOAT_TYPES, WIDE_TYPES, address, thread_count
from lossd_server.losses.row_group import RowGroup, RowSums

_SMALL = 1 << 14
"""Rows below which another thread costs more than it saves."""

_FORMULAS = {
    RowFormula.GIOU: 0,
    RowFormula.GIOU_OF_LTRB: 1,
    RowFormula.LOG_IOU_OF_LTRB: 2,
    RowFormula.CENTERNESS: 3,
}
"""The formulas, by their numbers in rows.c."""

_NUMBERS = {formula: 1 if formula is RowFormula.CENTERNESS else 4 for formula in RowFormula}
"""Numbers of a row."""

_TARGET_TYPES = {
    np.dtype(np.float32): WIDE_TYPES[torch.float32],
    np.dtype(np.float64): WIDE_TYPES[torch.float64],
}


class _Group(ctypes.Structure):
    """`row_group` of rows.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("preds", "gradient", "targets", "images", "cells", "factors", "rows")
        ),
        ("count", ctypes.c_int64),
        *((f"preds_{name}_stride", ctypes.c_int64) for name in ("batch", "number", "cell")),
        *((f"gradient_{name}_stride", ctypes.c_int64) for name in ("batch", "number", "cell")),
        *((name, ctypes.c_double) for name in ("scale", "floor")),
        *((f"{name}_type", ctypes.c_int32) for name in ("preds", "gradient", "targets")),
        *((name, ctypes.c_double) for name in ("losses", "extras")),
    )


def row_sums_natively(groups: Sequence[RowGroup], formula: RowFormula, floor: float) -> RowSums | None:
    """Returns what `row_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, to predictions of every type but float64.
    """
    library = loaded_library()
    if library is None or not all(map(_applies, groups)):
        return None
    problems = (_Group * len(groups))(*(_problem(group, floor) for group in groups))
    threads = thread_count(sum(len(group.targets) for group in groups), _SMALL)
    if library.lossd_rows(problems, len(groups), _FORMULAS[formula], threads):
        raise MemoryError
    return RowSums(
        losses=np.array([problem.losses for problem in problems]),
        extras=np.array([problem.extras for problem in problems]),
    )


def row_sums_of_arrays(
    preds: NDArray[np.float32],
    targets: NDArray[Any],
    factors: NDArray[np.float64] | None,
    gradient: NDArray[np.float32] | None,
    formula: RowFormula,
    *,
    scale: float,
    floor: float,
) -> tuple[float, float] | None:
    """Returns what `row_sums` does of one group, given as arrays without gaps; None where there is no kernel.

    Args:
        preds: P rows of K numbers, in any shape.
        targets: The same, float32 or float64.
        factors: See `RowGroup`.
        gradient: Like `preds`.
        formula: What is computed.
        scale: See `RowGroup`.
        floor: See `row_sums`.
    """
    library = loaded_library()
    if library is None:
        return None
    numbers = _NUMBERS[formula]
    count, strides = preds.size // numbers, (0, 1, numbers)
    problem = _Group(
        address_of(preds),
        None if gradient is None else address_of(gradient),
        address_of(targets),
        None,
        None,
        None if factors is None else address_of(factors),
        None,
        count,
        *strides,
        *strides,
        scale,
        floor,
        FLOAT_TYPES[torch.float32],
        FLOAT_TYPES[torch.float32],
        _TARGET_TYPES[targets.dtype],
    )
    if library.lossd_rows(ctypes.byref(problem), 1, _FORMULAS[formula], thread_count(count, _SMALL)):
        raise MemoryError
    return problem.losses, problem.extras


def takes_rows(*arrays: Any) -> bool:
    """Whether `row_sums_of_arrays` takes arguments: arrays of numpy, float32 or float64, without gaps."""
    return all(
        isinstance(array, np.ndarray) and array.dtype in _TARGET_TYPES and array.flags.c_contiguous
        for array in arrays
    )


def _applies(group: RowGroup) -> bool:
    preds, gradient, targets = group.preds, group.gradient, group.targets
    return (
        preds.device.type == "cpu"
        and preds.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and targets.dtype in WIDE_TYPES
        and targets.is_contiguous()
    )


def _problem(group: RowGroup, floor: float) -> _Group:
    """Returns the group in the kernel's terms; it points into the tensors."""
    gradient = group.preds if group.gradient is None else group.gradient
    return _Group(
        group.preds.data_ptr(),
        address(group.gradient),
        group.targets.data_ptr(),
        address(group.images),
        address(group.cells),
        address(group.factors),
        address(group.rows),
        len(group.targets),
        *group.preds.stride(),
        *gradient.stride(),
        group.scale,
        floor,
        FLOAT_TYPES[group.preds.dtype],
        FLOAT_TYPES[gradient.dtype],
        WIDE_TYPES[group.targets.dtype],
    )
