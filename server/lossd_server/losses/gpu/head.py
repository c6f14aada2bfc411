"""All terms of an FCOS head: one launch for all logits, one for all positives."""

from collections.abc import Sequence

from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.focal import applies, focal_launches
from lossd_server.losses.gpu.launch import run
from lossd_server.losses.gpu.library import loaded_programs
from lossd_server.losses.gpu.rows import row_launches, rows_apply
from lossd_server.losses.row_group import FLOOR, RowGroup


def head_sums_on_gpu(
    grids: Sequence[FocalGrid[Tensor]],
    constants: FocalConstants,
    boxes: Sequence[RowGroup[Tensor]],
    box_formula: RowFormula,
    centerness: Sequence[RowGroup[Tensor]],
) -> Tensor | None:
    """Returns what `term_sums` does of a head's L levels, `[5, L]`, by the programs.

    None where that does not apply. Two launches for up to 32 grids and 32 groups of rows, of one type
    each. Nothing waits for the device.
    """
    programs = loaded_programs()
    problems = [(group, box_formula) for group in boxes]
    problems += [(group, RowFormula.CENTERNESS) for group in centerness]
    if programs is None or not all(applies(grid, constants) for grid in grids):
        return None
    if not all(rows_apply(group) for group, _ in problems):
        return None
    wanted = len(grids) + 2 * len(problems)
    launches = focal_launches(grids, constants, programs, first_mean=wanted)
    launches += row_launches(problems, FLOOR, programs, len(grids))
    totals = run(launches, wanted + len(grids), grids[0].logits.device, programs)
    return totals[:wanted].view(5, len(grids))
