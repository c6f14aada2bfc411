"""The compiled kernel of row losses, called with tensors or arrays."""

import ctypes
from collections.abc import Sequence

import numpy as np

from lossd_server.kernels import loaded_library
from lossd_server.losses.arrays import A, address, is_dense, is_on_host, strides_of
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.native.numbers import FLOAT_TYPES, WIDE_TYPES, thread_count
from lossd_server.losses.row_group import FLOOR, RowGroup, RowSums

_SMALL = 1 << 14
"""Rows below which another thread costs more than it saves."""

_FORMULAS = {
    RowFormula.GIOU: 0,
    RowFormula.GIOU_OF_LTRB: 1,
    RowFormula.LOG_IOU_OF_LTRB: 2,
    RowFormula.CENTERNESS: 3,
}
"""The formulas, by their numbers in rows.c."""


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


def row_sums_natively(
    groups: Sequence[RowGroup[A]], formula: RowFormula, floor: float = FLOOR
) -> RowSums | None:
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
    found = [(problem.losses, problem.extras) for problem in problems]
    losses, extras = np.array(found).reshape(len(problems), 2).T
    return RowSums(losses=losses, extras=extras)


def _applies(group: RowGroup[A]) -> bool:
    preds, gradient, targets = group.preds, group.gradient, group.targets
    return (
        is_on_host(preds)
        and preds.dtype in FLOAT_TYPES
        and (gradient is None or gradient.dtype in FLOAT_TYPES)
        and targets.dtype in WIDE_TYPES
        and is_dense(targets)
    )


def _problem(group: RowGroup[A], floor: float) -> _Group:
    """Returns the group in the kernel's terms; it points into the arrays."""
    if not len(group.targets):
        return _Group()
    gradient = group.preds if group.gradient is None else group.gradient
    return _Group(
        address(group.preds),
        address(group.gradient),
        address(group.targets),
        address(group.images),
        address(group.cells),
        address(group.factors),
        address(group.rows),
        len(group.targets),
        *strides_of(group.preds),
        *strides_of(gradient),
        group.scale,
        floor,
        FLOAT_TYPES[group.preds.dtype],
        FLOAT_TYPES[gradient.dtype],
        WIDE_TYPES[group.targets.dtype],
    )
