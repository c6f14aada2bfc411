"""The three terms of an FCOS loss, each with its sums and its gradients level by level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.evaluation import Numbers
from lossd_server.losses.fcos_arguments import PREDICTIONS
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, grid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import head_sums_on_gpu
from lossd_server.losses.gradients import clear
from lossd_server.losses.locations import LevelTargets
from lossd_server.losses.presets import LossRules
from lossd_server.losses.row_group import RowGroup
from lossd_server.losses.row_kernel import row_sums
from lossd_server.losses.uploads import uploaded


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRequest:
    """How a term's gradients are wanted.

    Attributes:
        scales: What the derivative of each level's sum is multiplied by, `[L]`.
        buffers: Where they are written, one tensor a level, like the predictions.
    """

    scales: NDArray[np.float64]
    buffers: Sequence[Tensor]


class TermSums(NamedTuple):
    """The sums of the three terms over each of L levels.

    Attributes:
        numbers: `[5, L]`: the focal loss over the locations that take part, the box loss and the
            cross-entropy of centerness over the positives; then their negative sides, and the entropy of
            their target centerness.
        finite: Whether every class logit is; None where nobody looked.
    """

    numbers: Numbers
    finite: bool | None


def term_sums(
    preds: Sequence[Sequence[Tensor]],
    levels: Sequence[LevelTargets],
    constants: FocalConstants,
    rules: LossRules,
    requests: Sequence[GradientRequest | None],
) -> TermSums:
    """Returns the sums of the three terms, and writes gradients.

    Args:
        preds: Class logits, distances and centerness logits, each one tensor a level.
        levels: What they should be.
        constants: The constants of the focal loss.
        rules: Whether there is background, and which box loss it is.
        requests: How each kind's gradients are wanted.
    """
    device = preds[0][0].device
    targets = _on_device(levels, device)
    grids = _grids(preds[0], targets, requests[0], background=rules.background)
    boxes = _groups(preds[1], targets, [level.ltrb for level in targets], requests[1])
    centerness = _groups(preds[2], targets, [level.centerness for level in targets], requests[2])
    if device.type == "cuda":
        flat = [grid.flat() for grid in grids]
        numbers = head_sums_on_gpu(flat, constants, boxes, rules.box_formula, centerness)
        if numbers is not None:
            return TermSums(numbers=numbers, finite=None)
    cls = focal_sums(grids, constants)
    reg, entropies = row_sums(boxes, rules.box_formula), row_sums(centerness, RowFormula.CENTERNESS)
    rows = (cls.losses, reg.losses, entropies.losses, reg.extras, entropies.extras)
    return TermSums(numbers=_stacked(rows), finite=cls.finite)


def nonzero_rows(levels: Sequence[LevelTargets], rules: LossRules) -> dict[str, list[NDArray[np.int64]]]:
    """Returns by name the predictions that have a gradient at some places alone, with those of each level."""
    positives = [targets.places for targets in levels]
    return dict.fromkeys(PREDICTIONS[1:] if rules.background else PREDICTIONS, positives)


def over(sums: Numbers, divisors: NDArray[np.float64]) -> Numbers:
    """Returns each row of sums over its divisors, added up: `[5]` of `[5, L]`."""
    if isinstance(sums, Tensor):
        return (sums / torch.from_numpy(divisors).to(sums.device, non_blocking=True)).sum(dim=1)
    found: NDArray[np.float64] = (sums / divisors).sum(axis=1)
    return found


class _Targets(NamedTuple):
    """A level's targets, as `LevelTargets`, on the device of the predictions."""

    labels: Tensor
    ignored: Tensor | None
    image: Tensor
    cell: Tensor
    ltrb: Tensor
    centerness: Tensor


def _on_device(levels: Sequence[LevelTargets], device: torch.device) -> list[_Targets]:
    arrays = [
        array
        for level in levels
        for array in (
            level.labels,
            level.ignored,
            level.image,
            level.cell,
            level.ltrb,
            level.centerness[:, None],
        )
        if array is not None
    ]
    there = iter(uploaded(arrays, device))
    return [
        _Targets(
            labels=next(there),
            ignored=None if level.ignored is None else next(there),
            image=next(there),
            cell=next(there),
            ltrb=next(there),
            centerness=next(there),
        )
        for level in levels
    ]


def _stacked(rows: Sequence[Numbers]) -> Numbers:
    tensors = [row for row in rows if isinstance(row, Tensor)]
    return torch.stack(tensors) if tensors else np.array(rows)


def _grids(
    preds: Sequence[Tensor],
    targets: Sequence[_Targets],
    request: GradientRequest | None,
    *,
    background: bool,
) -> list[FocalGrid]:
    return [
        FocalGrid(
            logits=pred,
            labels=level.labels,
            background=background,
            ignored=level.ignored,
            gradient=None if request is None else request.buffers[i],
            scale=1.0 if request is None else float(request.scales[i]),
        )
        for i, (pred, level) in enumerate(zip(preds, targets, strict=True))
    ]


def _groups(
    preds: Sequence[Tensor],
    targets: Sequence[_Targets],
    wanted: Sequence[Tensor],
    request: GradientRequest | None,
) -> list[RowGroup]:
    """Returns the positives of each level; the gradient of every other location is made exactly zero."""
    clear(() if request is None else request.buffers)
    return [
        RowGroup(
            preds=grid(pred),
            targets=wanted[i],
            images=level.image,
            cells=level.cell,
            gradient=None if request is None else grid(request.buffers[i]),
            scale=1.0 if request is None else float(request.scales[i]),
        )
        for i, (pred, level) in enumerate(zip(preds, targets, strict=True))
    ]
