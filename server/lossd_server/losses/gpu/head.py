"""All terms of an FCOS head: one launch for all logits, one for all positives, one for the sums."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid
from lossd_server.losses.gpu.focal import applies, focal_launches, in_order
from lossd_server.losses.gpu.launch import run
from lossd_server.losses.gpu.library import loaded_programs
from lossd_server.losses.gpu.rows import Problem, row_launches, row_totals, rows_apply
from lossd_server.losses.row_group import RowSums


class HeadTotals(NamedTuple):
    """What a head comes to.

    Attributes:
        cls: Summed focal loss of each grid, `[G]` float64.
        rows: Sums of each group of rows.
    """

    cls: Tensor
    rows: RowSums


def head_sums_on_gpu(
    grids: Sequence[FocalGrid], constants: FocalConstants, problems: Sequence[Problem], floor: float = 1e-7
) -> HeadTotals | None:
    """Returns what `focal_sums` and `row_sums` do, together; None where that does not apply.

    Three launches for up to 32 grids and 32 groups of rows, of one type each, whatever their
    formulas. Nothing waits for the device.

    Args:
        grids: Logits and labels, one grid a level.
        constants: The constants of the focal loss.
        problems: The positives of each level, once for the box loss and once for centerness.
        floor: Least area, and least IoU under a logarithm.
    """
    programs = loaded_programs()
    if programs is None or not grids or not all(applies(grid, constants) for grid in grids):
        return None
    if not all(rows_apply(group) for group, _ in problems):
        return None
    of_grids, grid_order = focal_launches(grids, constants, programs)
    of_rows, row_order = row_launches(problems, floor, programs)
    totals = run([*of_grids, *of_rows], grids[0].logits.device, programs)
    return HeadTotals(in_order(totals[: len(grids)], grid_order), row_totals(totals[len(grids) :], row_order))
