"""The compiled kernel of row losses, called with tensors or arrays."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

import numpy as np

from lossd_server.kernels import address_of, loaded_library
from lossd_server.losses.arrays import A, Form, address, form_of
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
        frame = _frame(*map(form_of, (group.preds, group.gradient, group.targets)))
        if frame is None:
            return None
        more = len(group.targets)
        places = (
            group.preds,
            group.gradient,
            group.targets,
            group.images,
            group.cells,
            group.factors,
            group.rows,
        )
        problems.append(
            _GROUP.pack(*map(address, places), more, *frame.strides, group.scale, floor, *frame.types)
        )
        count += more
    sums = np.empty((len(groups), 2))
    threads = thread_count(count, _SMALL)
    if library.lossd_rows(b"".join(problems), len(groups), _FORMULAS[formula], threads, address_of(sums)):
        raise MemoryError
    losses, extras = sums.T
    return RowSums(losses=losses, extras=extras)


class _Frame(NamedTuple):
    """What is the same for all groups whose arrays are of the same forms: see `_GROUP`."""

    strides: tuple[int, ...]
    types: tuple[int, ...]


@lru_cache(maxsize=1024)
def _frame(preds: Form, gradient: Form | None, targets: Form) -> _Frame | None:
    """Returns the frame of a group; None where the kernel does not apply."""
    like = gradient or preds
    applies = (
        preds.is_on_host
        and preds.dtype in FLOAT_TYPES
        and like.dtype in FLOAT_TYPES
        and targets.dtype in WIDE_TYPES
        and targets.is_dense
    )
    if not applies:
        return None
    types = FLOAT_TYPES[preds.dtype], FLOAT_TYPES[like.dtype], WIDE_TYPES[targets.dtype]
    return _Frame(strides=(*preds.strides, *like.strides), types=types)


def _places(group: RowGroup[A]) -> Iterable[int]:
    arrays = group.preds, group.gradient, group.targets, group.images, group.cells, group.factors, group.rows
    return map(address, arrays)
