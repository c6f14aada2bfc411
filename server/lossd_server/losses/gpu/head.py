"""All terms of an FCOS head: one launch for all logits, one for all positives, one for the sums."""

from collections.abc import Sequence

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.focal import applies, focal_launches, in_order
from lossd_server.losses.gpu.launch import run
from lossd_server.losses.gpu.library import loaded_programs
from lossd_server.losses.gpu.rows import row_launches, row_totals, rows_apply
from lossd_server.losses.row_group import RowGroup, RowSums

_FLOOR = 1e-7
"""As of `row_sums`."""


def head_sums_on_gpu(
    grids: Sequence[FocalGrid],
    constants: FocalConstants,
    boxes: Sequence[RowGroup],
    box_formula: RowFormula,
    centerness: Sequence[RowGroup],
) -> tuple[FocalSums, RowSums, RowSums] | None:
    """Returns what `focal_sums` does of the grids and `row_sums` of boxes and centerness.

    None where that does not apply. Three launches for up to 32 grids and 32 groups of rows, of one
    type each. Nothing waits for the device.
    """
    programs = loaded_programs()
    problems = [(group, box_formula) for group in boxes]
    problems += [(group, RowFormula.CENTERNESS) for group in centerness]
    if programs is None or not all(applies(grid, constants) for grid in grids):
        return None
    if not all(rows_apply(group) for group, _ in problems):
        return None
    of_grids, grid_order = focal_launches(grids, constants, programs)
    of_rows, row_order = row_launches(problems, _FLOOR, programs)
    totals = run([*of_grids, *of_rows], grids[0].logits.device, programs)
    cls = in_order(totals[: len(grids)], grid_order)
    losses, extras = row_totals(totals[len(grids) :], row_order)
    middle = len(boxes)
    return (
        FocalSums(losses=cls, finite=None),
        RowSums(losses=losses[:middle], extras=extras[:middle]),
        RowSums(losses=losses[middle:], extras=extras[middle:]),
    )
