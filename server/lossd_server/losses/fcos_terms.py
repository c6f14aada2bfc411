"""The three terms of an FCOS loss, each with its sums and its gradients level by level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.evaluation import Numbers
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums, grid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gradients import clear
from lossd_server.losses.locations import LevelTargets
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


def classification_sums(
    preds: Sequence[Tensor],
    levels: Sequence[LevelTargets],
    constants: FocalConstants,
    request: GradientRequest | None,
    *,
    background: bool,
) -> FocalSums:
    """Returns the focal loss over the locations of each level that take part, and writes gradients."""
    grids = [
        FocalGrid(
            logits=grid(pred),
            labels=_on_device(targets.labels, pred),
            background=background,
            ignored=None if targets.ignored is None else _on_device(targets.ignored, pred),
            gradient=None if request is None else grid(request.buffers[level]),
            scale=1.0 if request is None else float(request.scales[level]),
        )
        for level, (pred, targets) in enumerate(zip(preds, levels, strict=True))
    ]
    return focal_sums(grids, constants)


def regression_sums(
    preds: Sequence[Tensor],
    levels: Sequence[LevelTargets],
    formula: RowFormula,
    request: GradientRequest | None,
) -> RowSums:
    """Returns the box loss over the positives of each level, and their negative sides."""
    return _positive_sums(preds, levels, [targets.ltrb for targets in levels], formula, request)


def centerness_sums(
    preds: Sequence[Tensor], levels: Sequence[LevelTargets], request: GradientRequest | None
) -> RowSums:
    """Returns the cross-entropy over the positives of each level, and the entropy of their targets."""
    wanted = [targets.centerness[:, None] for targets in levels]
    return _positive_sums(preds, levels, wanted, RowFormula.CENTERNESS, request)


def total(values: Numbers) -> float | Tensor:
    """Returns the sum over levels."""
    return values.sum() if isinstance(values, Tensor) else float(values.sum())


def over(sums: Numbers, divisors: NDArray[np.float64]) -> Numbers:
    """Returns the sums of levels, each over its divisor."""
    return sums / torch.from_numpy(divisors).to(sums.device) if isinstance(sums, Tensor) else sums / divisors


def _positive_sums(
    preds: Sequence[Tensor],
    levels: Sequence[LevelTargets],
    wanted: Sequence[NDArray[Any]],
    formula: RowFormula,
    request: GradientRequest | None,
) -> RowSums:
    """Evaluates the positives of each level; the gradient of every other location is exactly zero."""
    for buffer in () if request is None else request.buffers:
        clear(buffer)
    groups = [
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
    return row_sums(groups, formula)


def _on_device(array: NDArray[Any], like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array) if array.strides[-1] != array.itemsize else array)
    return tensor.to(like.device)
