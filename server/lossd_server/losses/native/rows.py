"""The compiled kernel of row losses, called with tensors or arrays."""

from collections.abc import Sequence
from struct import Struct

import numpy as np

from lossd_server.kernels import address_of, loaded_library
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


_GROUP = Struct(
    "7P"  # preds, gradient, targets, images, cells, factors, rows
    "q"  # count
    "3q3q"  # how far images, numbers and cells are apart: preds, gradient
    "2d"  # scale, floor
    "3i4x"  # types of preds, gradient and targets
)
"""`row_group` of rows.c."""

_EMPTY = bytes(_GROUP.size)


def row_sums_natively(
    groups: Sequence[RowGroup[A]], formula: RowFormula, floor: float = FLOOR
) -> RowSums | None:
    """Returns what `row_sums` does, by the compiled kernel; None where that does not apply.

    It applies on the CPU, to predictions of every type but float64.
    """
    library = loaded_library()
    if library is None:
        return None
    problems, count = [], 0
    for group in groups:
        problem = _problem(group, floor)
        if problem is None:
            return None
        problems.append(problem)
        count += len(group.targets)
    sums = np.empty((len(groups), 2))
    threads = thread_count(count, _SMALL)
    if library.lossd_rows(b"".join(problems), len(groups), _FORMULAS[formula], threads, address_of(sums)):
        raise MemoryError
    losses, extras = sums.T
    return RowSums(losses=losses, extras=extras)


def _problem(group: RowGroup[A], floor: float) -> bytes | None:
    """Returns the group in the kernel's terms, which points into the arrays; None where it has none."""
    preds: A = group.preds
    targets: A = group.targets
    like: A = preds if group.gradient is None else group.gradient
    types = FLOAT_TYPES.get(preds.dtype), FLOAT_TYPES.get(like.dtype), WIDE_TYPES.get(targets.dtype)
    if None in types or not (is_on_host(preds) and is_dense(targets)):
        return None
    if not len(targets):
        return _EMPTY
    arrays = preds, group.gradient, targets, group.images, group.cells, group.factors, group.rows
    strides: tuple[int, ...] = (*strides_of(preds), *strides_of(like))
    return _GROUP.pack(*map(address, arrays), len(targets), *strides, group.scale, floor, *types)
