"""The program of row losses, called with tensors."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.launch import FREE, Launch, Words, address_of, bits_of, run
from lossd_server.losses.gpu.library import loaded_programs
from lossd_server.losses.row_group import RowGroup, RowSums

MOST_GROUPS = 32
"""As in programs/rows.py."""

_ROWS = 128

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_FORMULAS = {
    RowFormula.GIOU: 0,
    RowFormula.GIOU_OF_LTRB: 1,
    RowFormula.LOG_IOU_OF_LTRB: 2,
    RowFormula.CENTERNESS: 3,
}
"""The formulas, by their numbers in programs/rows.py."""

Problem = tuple[RowGroup, RowFormula]
"""Rows, and what is computed of them."""


class RowsVariant(NamedTuple):
    """What the program of rows is compiled for; everything else is read as it runs.

    Attributes:
        preds: Type of the predictions.
        gradient: Type of the gradient, that of the predictions or float32; None without a gradient.
    """

    preds: torch.dtype
    gradient: torch.dtype | None


ROWS_VARIANTS = frozenset(
    RowsVariant(preds=preds, gradient=gradient)
    for preds in _DTYPES
    for gradient in {None, preds, torch.float32}
)
"""All there are, as `FOCAL_VARIANTS`."""


def row_sums_on_gpu(groups: Sequence[RowGroup], formula: RowFormula, floor: float) -> RowSums | None:
    """Returns what `row_sums` does, by the program; None where that does not apply.

    It applies for every type of predictions but float64. All groups take one launch, unless they
    differ in type or are more than 32; the sums take another. Nothing waits for the device.
    """
    programs = loaded_programs()
    problems = [(group, formula) for group in groups]
    if programs is None or not problems or not all(rows_apply(group) for group in groups):
        return None
    launches, order = row_launches(problems, floor, programs)
    return row_totals(run(launches, groups[0].preds.device, programs), order)


def rows_apply(group: RowGroup) -> bool:
    """Whether there is a program for the rows."""
    return (
        variant_of(group) in ROWS_VARIANTS
        and group.targets.is_floating_point()
        and (group.factors is None or group.factors.dtype == torch.float64)
        and len(group.targets) < 1 << 31
    )


def variant_of(group: RowGroup) -> RowsVariant:
    """Returns what the program has to be compiled for."""
    return RowsVariant(
        preds=group.preds.dtype, gradient=None if group.gradient is None else group.gradient.dtype
    )


def row_launches(
    problems: Sequence[Problem], floor: float, programs: ModuleType
) -> tuple[list[Launch], list[int]]:
    """Returns the launches, and which problem each pair of their totals is of."""
    launches, order = [], []
    for variant, numbers in _chunks(problems):
        launches.append(_launch([problems[i] for i in numbers], floor, variant, programs))
        order += numbers
    return launches, order


def row_totals(totals: Tensor, order: Sequence[int]) -> RowSums:
    """Returns totals, a loss and an extra for each problem as `order` says, in the problems' order."""
    losses, extras = totals[0::2], totals[1::2]
    if list(order) == sorted(order):
        return RowSums(losses, extras)
    places = torch.from_numpy(np.argsort(order)).to(totals.device, non_blocking=True)
    return RowSums(losses[places], extras[places])


def _chunks(problems: Sequence[Problem]) -> Iterator[tuple[RowsVariant, list[int]]]:
    """Yields which problems go together: those of one variant, up to `MOST_GROUPS`."""
    variants = [variant_of(group) for group, _ in problems]
    for variant in dict.fromkeys(variants):
        numbers = [i for i, its in enumerate(variants) if its == variant]
        for first in range(0, len(numbers), MOST_GROUPS):
            yield variant, numbers[first : first + MOST_GROUPS]


def _launch(problems: Sequence[Problem], floor: float, variant: RowsVariant, programs: ModuleType) -> Launch:
    ends = [0, *accumulate(-(-len(group.targets) // _ROWS) for group, _ in problems)]
    count = ends[-1]
    firsts = [*ends[:-1], *[FREE] * (MOST_GROUPS - len(problems))]
    targets = [_targets(group) for group, _ in problems]
    fields = [_fields(*problem, wanted, floor) for problem, wanted in zip(problems, targets, strict=True)]
    spans = [span for a, b in pairwise(ends) for span in ((a, b), (count + a, count + b))]
    return Launch(
        program="rows_program",
        words=[*firsts, *chain.from_iterable(fields)],
        program_count=count,
        spans=spans,
        constants={
            "TYPE": programs.TYPES[variant.preds],
            "GRADIENT": programs.TYPES[variant.gradient],
            "ROWS": _ROWS,
        },
        tensors=targets,
    )


def _targets(group: RowGroup) -> Tensor:
    """Returns the targets as the program reads them: in float32 or float64, row by row."""
    wide = torch.promote_types(group.targets.dtype, torch.float32)
    return group.targets.to(wide).contiguous()


def _fields(group: RowGroup, formula: RowFormula, targets: Tensor, floor: float) -> Words:
    """Returns the group's words; the program knows them by their places."""
    gradient = group.preds if group.gradient is None else group.gradient
    addresses = (group.preds, group.gradient, targets, group.images, group.cells, group.factors, group.rows)
    return [
        *map(address_of, addresses),
        len(targets),
        *group.preds.stride(),
        *gradient.stride(),
        bits_of(group.scale),
        bits_of(floor),
        _FORMULAS[formula],
        targets.dtype == torch.float64,
    ]
