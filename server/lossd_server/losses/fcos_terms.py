"""The three terms of an FCOS loss, each with its sums and its gradients level by level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.evaluation import Numbers
from lossd_server.losses.fcos_arguments import PREDICTIONS
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums, grid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import head_sums_on_gpu
from lossd_server.losses.gradients import clear
from lossd_server.losses.locations import LevelTargets
from lossd_server.losses.presets import LossRules
from lossd_server.losses.row_group import RowGroup, RowSums
from lossd_server.losses.row_kernel import row_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRequest:
    """How a term's gradients are wanted.

    Attributes:
        scales: What the derivative of each level's sum is multiplied by, `[L]`.
        buffers: Where they are written, one tensor a level, like the predictions.
    """

    scales: NDArray[np.float64]
    buffers: Sequence[Tensor]


def term_sums(
    preds: Sequence[Sequence[Tensor]],
    levels: Sequence[LevelTargets],
    constants: FocalConstants,
    rules: LossRules,
    requests: Sequence[GradientRequest | None],
) -> tuple[FocalSums, RowSums, RowSums]:
    """Returns the sums of the three terms over each level, and writes gradients.

    The focal loss over the locations that take part, the box loss over the positives with their
    negative sides, and the cross-entropy of centerness over them with the entropy of their targets.

    Args:
        preds: Class logits, distances and centerness logits, each one tensor a level.
        levels: What they should be.
        constants: The constants of the focal loss.
        rules: Whether there is background, and which box loss it is.
        requests: How each kind's gradients are wanted.
    """
    grids = _grids(preds[0], levels, requests[0], background=rules.background)
    boxes = _groups(preds[1], levels, [targets.ltrb for targets in levels], requests[1])
    wanted = [targets.centerness[:, None] for targets in levels]
    centerness = _groups(preds[2], levels, wanted, requests[2])
    if preds[0][0].is_cuda:
        found = head_sums_on_gpu(
            [grid.flat() for grid in grids], constants, boxes, rules.box_formula, centerness
        )
        if found is not None:
            return found
    return (
        focal_sums(grids, constants),
        row_sums(boxes, rules.box_formula),
        row_sums(centerness, RowFormula.CENTERNESS),
    )


def nonzero_rows(levels: Sequence[LevelTargets], rules: LossRules) -> dict[str, list[NDArray[np.int64]]]:
    """Returns by name the predictions that have a gradient at some places alone, with those of each level."""
    positives = [targets.places for targets in levels]
    return dict.fromkeys(PREDICTIONS[1:] if rules.background else PREDICTIONS, positives)


def total(values: Numbers) -> float | Tensor:
    """Returns the sum over levels."""
    return values.sum() if isinstance(values, Tensor) else float(values.sum())


def over(sums: Numbers, divisors: NDArray[np.float64]) -> Numbers:
    """Returns the sums of levels, each over its divisor."""
    return (
        sums / torch.from_numpy(divisors).to(sums.device, non_blocking=True)
        if isinstance(sums, Tensor)
        else sums / divisors
    )


def _grids(
    preds: Sequence[Tensor],
    levels: Sequence[LevelTargets],
    request: GradientRequest | None,
    *,
    background: bool,
) -> list[FocalGrid]:
    return [
        FocalGrid(
            logits=pred,
            labels=_on_device(targets.labels, pred),
            background=background,
            ignored=None if targets.ignored is None else _on_device(targets.ignored, pred),
            gradient=None if request is None else request.buffers[level],
            scale=1.0 if request is None else float(request.scales[level]),
        )
        for level, (pred, targets) in enumerate(zip(preds, levels, strict=True))
    ]


def _groups(
    preds: Sequence[Tensor],
    levels: Sequence[LevelTargets],
    wanted: Sequence[NDArray[Any]],
    request: GradientRequest | None,
) -> list[RowGroup]:
    """Returns the positives of each level; the gradient of every other location is made exactly zero."""
    for buffer in () if request is None else request.buffers:
        clear(buffer)
    return [
        RowGroup(
            preds=grid(pred),
            targets=_on_device(wanted[level], pred),
            images=_on_device(targets.image, pred),
            cells=_on_device(targets.cell, pred),
            gradient=None if request is None else grid(request.buffers[level]),
            scale=1.0 if request is None else float(request.scales[level]),
        )
        for level, (pred, targets) in enumerate(zip(preds, levels, strict=True))
    ]


def _on_device(array: NDArray[Any], like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array) if array.strides[-1] != array.itemsize else array)
    return tensor.to(like.device, non_blocking=True)  # the driver has read it when this returns
