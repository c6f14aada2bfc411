"""Compiles every program for every type and layout that a request can bring."""

import torch

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, grid
from lossd_server.losses.gpu.focal import FOCAL_VARIANTS, FocalVariant, focal_sums_on_gpu
from lossd_server.losses.gpu.head import POSITIVES_VARIANTS, PositivesVariant, PositiveTerms, head_sums_on_gpu
from lossd_server.losses.gpu.library import give_up, load_programs


def compile_programs(device: torch.device) -> None:
    """Loads the programs and compiles all variants, or finds them where an earlier process left them.

    Shapes, strides, alignment, background, ignored locations, rows, scales and gammas other than 2
    are read as a program runs: no request that comes later has to be compiled for.
    """
    if load_programs(device) is None:
        return
    try:
        for focal in FOCAL_VARIANTS:
            _compile_focal(focal, device)
        for positives in POSITIVES_VARIANTS:
            _compile_positives(positives, device)
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise
        give_up(error)


def _compile_focal(variant: FocalVariant, device: torch.device) -> None:
    layout = torch.contiguous_format if variant.cells_inner else torch.channels_last
    logits = torch.zeros(1, 2, 2, 2, dtype=variant.logits, device=device).to(memory_format=layout)
    gradient = None if variant.gradient is None else grid(torch.empty_like(logits, dtype=variant.gradient))
    labels = torch.zeros(1, 4, dtype=torch.int64, device=device)
    scale = torch.ones(1, dtype=torch.float64, device=device)
    problem = FocalGrid(logits=grid(logits), labels=labels, gradient=gradient, scale=scale)
    focal_sums_on_gpu([problem], FocalConstants(alpha=None, gamma=2.0 if variant.square else 1.0))


def _compile_positives(variant: PositivesVariant, device: torch.device) -> None:
    preds = [torch.ones(1, channels, 1, 1, dtype=variant.preds, device=device) for channels in (4, 1)]
    gradients = [torch.zeros_like(pred, dtype=variant.gradient) for pred in preds]
    place = torch.zeros(1, dtype=torch.int64, device=device)
    terms = PositiveTerms(
        reg_preds=preds[:1],
        centerness_preds=preds[1:],
        starts=(0, 1),
        image=place,
        location=place,
        ltrb=torch.ones(1, 4, device=device),
        centerness=torch.ones(1, device=device),
        giou=variant.giou,
        reg_gradients=gradients[:1],
        centerness_gradients=gradients[1:],
    )
    head_sums_on_gpu([], FocalConstants(alpha=None, gamma=2.0), terms)
