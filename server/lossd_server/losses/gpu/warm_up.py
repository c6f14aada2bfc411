"""Compiles every program for every type and layout that a request can bring."""

import torch

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, grid
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.focal import FOCAL_VARIANTS, FocalVariant, focal_sums_on_gpu
from lossd_server.losses.gpu.library import give_up, load_programs
from lossd_server.losses.gpu.rows import ROWS_VARIANTS, RowsVariant, row_sums_on_gpu
from lossd_server.losses.row_group import RowGroup


def compile_programs(device: torch.device) -> None:
    """Loads the programs and compiles all variants, or finds them where an earlier process left them.

    Shapes, strides, alignment, background, ignored locations, rows, scales, formulas and gammas other
    than 2 are read as a program runs: no request that comes later has to be compiled for.
    """
    if load_programs(device) is None:
        return
    try:
        for focal in FOCAL_VARIANTS:
            _compile_focal(focal, device)
        for rows in ROWS_VARIANTS:
            _compile_rows(rows, device)
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise
        give_up(error)


def _compile_focal(variant: FocalVariant, device: torch.device) -> None:
    layout = torch.contiguous_format if variant.cells_inner else torch.channels_last
    logits = torch.zeros(1, 2, 2, 2, dtype=variant.logits, device=device).to(memory_format=layout)
    gradient = None if variant.gradient is None else grid(torch.empty_like(logits, dtype=variant.gradient))
    labels = torch.zeros(1, 4, dtype=torch.int64, device=device)
    problem = FocalGrid(logits=grid(logits), labels=labels, gradient=gradient)
    focal_sums_on_gpu([problem], FocalConstants(alpha=None, gamma=2.0 if variant.square else 1.0))


def _compile_rows(variant: RowsVariant, device: torch.device) -> None:
    preds = torch.ones(1, 4, 1, dtype=variant.preds, device=device)
    gradient = None if variant.gradient is None else torch.empty_like(preds, dtype=variant.gradient)
    row = RowGroup(preds=preds, targets=torch.ones(1, 4, device=device), gradient=gradient)
    row_sums_on_gpu([row], RowFormula.GIOU, 1e-7)
