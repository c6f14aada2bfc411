"""Focal loss and its gradient over grids of logits, in one go.

By a compiled kernel where there is one for the case, otherwise by torch in cache-sized portions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lossd_server.losses.evaluation import fixed_order_sum, stacked
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums, flat, taking_part
from lossd_server.losses.formulas import focal_terms
from lossd_server.losses.gpu import focal_sums_on_gpu
from lossd_server.losses.native import focal_sums_natively

_PORTION = 1 << 17
"""Logits that torch looks at together on a CPU: the half-dozen temporaries stay in the cache."""

_PORTION_OF_GPU = 1 << 24
"""The same on a GPU, where a launch costs more than memory."""


def focal_sums(grids: Sequence[FocalGrid[Tensor]], constants: FocalConstants) -> FocalSums:
    """Returns the summed focal loss of each grid, and writes gradients and rows."""
    compiled = focal_sums_natively(grids, constants)
    if compiled is not None:
        return compiled
    grids = list(map(flat, grids))
    on_gpu = any(grid.logits.is_cuda for grid in grids)
    compiled = (focal_sums_on_gpu if on_gpu else focal_sums_natively)(grids, constants)
    if compiled is not None:
        return compiled
    losses = [_sum_by_torch(grid, constants) for grid in grids]
    return FocalSums(losses=stacked(losses), finite=None)


def _sum_by_torch(grid: FocalGrid[Tensor], constants: FocalConstants) -> Tensor:
    grid = grid._replace(labels=grid.labels.to(torch.int64))
    logits, labels = grid.logits, grid.labels
    rows = grid.rows
    if rows is None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = torch.empty(labels.shape, dtype=dtype, device=logits.device)
    rows.zero_()
    idle = ~taking_part(grid)
    portion = _PORTION_OF_GPU if logits.is_cuda else _PORTION
    for images, cells in _portions(logits.shape, portion) if logits.shape[1] else ():
        at = images, slice(None), cells
        loss, slope = _portion(logits[at], labels[images, cells], constants, rows.dtype)
        idle_here = idle[images, cells]
        rows[images, cells] = loss.masked_fill_(idle_here, 0)
        if grid.gradient is not None:
            grid.gradient[at] = slope.mul_(grid.scale).masked_fill_(idle_here.unsqueeze(1), 0)
    return fixed_order_sum(rows)


def _portion(
    logits: Tensor, labels: Tensor, constants: FocalConstants, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns loss `[b, s]` and slope `[b, C, s]`, as if every location took part.

    All logits are taken for negatives; the one of each object's class is put in with its sign
    flipped, since `f(-x)` is the loss of a positive, and its weight set apart.
    """
    own_class = labels.clamp(min=0).unsqueeze(1)
    has_object = (labels >= 0).unsqueeze(1)
    z = logits.to(dtype, copy=True)
    own = z.gather(1, own_class)
    z.scatter_(1, own_class, torch.where(has_object, -own, own))
    loss, slope = focal_terms(z, constants.gamma)
    negative, positive = constants.negative_weight, constants.positive_weight
    own_loss = loss.gather(1, own_class) * torch.where(has_object, positive, negative)
    own_slope = slope.gather(1, own_class) * torch.where(has_object, -positive, negative)
    loss.mul_(negative).scatter_(1, own_class, own_loss)
    slope.mul_(negative).scatter_(1, own_class, own_slope)
    return loss.sum(dim=1), slope


def _portions(shape: Sequence[int], portion: int) -> Iterator[tuple[slice, slice]]:
    """Yields ranges of images and cells that cover a grid: whole images where they are small."""
    images, classes, cells = shape
    cells_at_once = max(portion // max(classes, 1), 1)
    images_at_once = max(cells_at_once // max(cells, 1), 1)
    for image in range(0, images, images_at_once):
        for cell in range(0, cells, cells_at_once):
            yield slice(image, image + images_at_once), slice(cell, cell + cells_at_once)
