"""Compiles every program for every type and layout that a request can bring."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

import torch

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, grid
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu.focal import FOCAL_VARIANTS, FocalVariant, focal_launches
from lossd_server.losses.gpu.launch import run
from lossd_server.losses.gpu.library import find_programs, give_up, use_programs
from lossd_server.losses.gpu.rows import ROWS_VARIANTS, RowsVariant, row_launches
from lossd_server.losses.row_group import RowGroup

_MOST_WORKERS = 8
"""Each compiles by itself, and takes memory for it."""


def compile_programs(device: torch.device) -> None:
    """Compiles all variants, or finds them where an earlier process left them, and only then uses them.

    Shapes, strides, alignment, background, ignored locations, rows, scales, formulas and gammas other
    than 2 are read as a program runs: no request that comes later has to be compiled for.
    """
    programs = find_programs(device)
    if programs is None:
        return
    work: list[Callable[[], None]] = [
        *(partial(_compile_focal, variant, device, programs) for variant in FOCAL_VARIANTS),
        *(partial(_compile_rows, variant, device, programs) for variant in ROWS_VARIANTS),
    ]
    # The compiler lets go of the interpreter; what stands in for a GPU in tests takes one at a time.
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if device.type == "cuda" else 1
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="lossd-compile") as pool:
            for compiled in [pool.submit(one) for one in work]:
                compiled.result()
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise
        give_up(error)
    else:
        use_programs(programs)


def _compile_focal(variant: FocalVariant, device: torch.device, programs: ModuleType) -> None:
    layout = torch.contiguous_format if variant.cells_inner else torch.channels_last
    logits = torch.zeros(1, 2, 2, 2, dtype=variant.logits, device=device).to(memory_format=layout)
    gradient = None if variant.gradient is None else grid(torch.empty_like(logits, dtype=variant.gradient))
    labels = torch.zeros(1, 4, dtype=torch.int64, device=device)
    problem = FocalGrid(logits=grid(logits), labels=labels, gradient=gradient)
    constants = FocalConstants(alpha=None, gamma=2.0 if variant.square else 1.0)
    run(focal_launches([problem], constants, programs, 1), 2, device, programs)


def _compile_rows(variant: RowsVariant, device: torch.device, programs: ModuleType) -> None:
    preds = torch.ones(1, 4, 1, dtype=variant.preds, device=device)
    gradient = None if variant.gradient is None else torch.empty_like(preds, dtype=variant.gradient)
    row = RowGroup(preds=preds, targets=torch.ones(1, 4, device=device), gradient=gradient)
    run(row_launches([(row, RowFormula.GIOU)], 1e-7, programs, 0), 2, device, programs)
