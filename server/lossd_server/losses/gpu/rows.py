"""The program of row losses, called with tensors."""

from collections.abc import Sequence
from itertools import accumulate, chain
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.launch import FREE, Launch, Words, address_of, alike, bits_of, run
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

Problem = tuple[RowGroup[Tensor], RowFormula]
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


def row_sums_on_gpu(groups: Sequence[RowGroup[Tensor]], formula: RowFormula, floor: float) -> RowSums | None:
    """Returns what `row_sums` does, by the program; None where that does not apply.

    It applies for every type of predictions but float64. All groups take one launch, unless they
    differ in type or are more than 32. Nothing waits for the device.
    """
    programs = loaded_programs()
    problems = [(group, formula) for group in groups]
    if programs is None or not problems or not all(rows_apply(group) for group in groups):
        return None
    launches = row_launches(problems, floor, programs, 0)
    totals = run(launches, 2 * len(groups), groups[0].preds.device, programs)
    return RowSums(totals[: len(groups)], totals[len(groups) :])


def rows_apply(group: RowGroup[Tensor]) -> bool:
    """Whether there is a program for the rows."""
    return (
        variant_of(group) in ROWS_VARIANTS
        and group.targets.is_floating_point()
        and (group.factors is None or group.factors.dtype == torch.float64)
        and len(group.targets) < 1 << 31
    )


def variant_of(group: RowGroup[Tensor]) -> RowsVariant:
    """Returns what the program has to be compiled for."""
    return RowsVariant(
        preds=group.preds.dtype, gradient=None if group.gradient is None else group.gradient.dtype
    )


def row_launches(
    problems: Sequence[Problem], floor: float, programs: ModuleType, first_total: int
) -> list[Launch]:
    """Returns the launches: those of one variant go together, up to `MOST_GROUPS`.

    Losses in the order of problems from `first_total` on, then extras.
    """
    variants = [variant_of(group) for group, _ in problems]
    return [
        _launch(problems, numbers, floor, variant, programs, first_total)
        for variant, numbers in alike(variants, MOST_GROUPS)
    ]


def _launch(
    problems: Sequence[Problem],
    numbers: Sequence[int],
    floor: float,
    variant: RowsVariant,
    programs: ModuleType,
    first_total: int,
) -> Launch:
    mine = [problems[i] for i in numbers]
    counts = [max(-(-len(group.targets) // _ROWS), 1) for group, _ in mine]
    firsts = [*accumulate(counts[:-1], initial=0), *[FREE] * (MOST_GROUPS - len(numbers))]
    targets = [_targets(group) for group, _ in mine]
    losses = [first_total + i for i in numbers]
    fields = [
        [*_fields(*problem, wanted, floor), count, 0, loss, loss + len(problems)]
        for problem, wanted, count, loss in zip(mine, targets, counts, losses, strict=True)
    ]
    return Launch(
        program="rows_program",
        words=[*firsts, *chain.from_iterable(fields)],
        program_count=sum(counts),
        sum_count=2 * sum(counts),
        constants={
            "TYPE": programs.TYPES[variant.preds],
            "GRADIENT": programs.TYPES[variant.gradient],
            "ROWS": _ROWS,
        },
        tensors=targets,
    )


def _targets(group: RowGroup[Tensor]) -> Tensor:
    """Returns the targets as the program reads them: in float32 or float64, row by row."""
    wide = torch.promote_types(group.targets.dtype, torch.float32)
    return group.targets.to(wide).contiguous()


def _fields(group: RowGroup[Tensor], formula: RowFormula, targets: Tensor, floor: float) -> Words:
    """Returns the group's words but the last four; the program knows them by their places."""
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
