"""The three terms of an FCOS loss, each with its sums and its gradients level by level."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.arrays import A, in_rows
from lossd_server.losses.evaluation import Numbers
from lossd_server.losses.fcos_arguments import PREDICTIONS
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums, flat, grid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import head_sums_on_gpu
from lossd_server.losses.gradients import clear
from lossd_server.losses.locations import LevelTargets
from lossd_server.losses.native import focal_sums_natively, row_sums_natively
from lossd_server.losses.presets import LossRules
from lossd_server.losses.row_group import RowGroup, RowSums
from lossd_server.losses.row_kernel import row_sums
from lossd_server.losses.uploads import uploaded


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRequest(Generic[A]):
    """How a term's gradients are wanted.

    Attributes:
        scales: What the derivative of each level's sum is multiplied by, `[L]`.
        buffers: Where they are written, one a level, like the predictions.
    """

    scales: NDArray[np.float64]
    buffers: Sequence[A]


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
    requests: Sequence[GradientRequest[Tensor] | None],
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
    head = _head(preds, levels, uploaded(_arrays_of(levels), device), rules, requests)
    if device.type == "cuda":
        grids = list(map(flat, head.grids))
        numbers = head_sums_on_gpu(grids, constants, head.boxes, rules.box_formula, head.centerness)
        if numbers is not None:
            return TermSums(numbers=numbers, finite=None)
    cls = focal_sums(head.grids, constants)
    reg = row_sums(head.boxes, rules.box_formula)
    entropies = row_sums(head.centerness, RowFormula.CENTERNESS)
    return _together(cls, reg, entropies)


def term_sums_of_arrays(
    preds: Sequence[Sequence[NDArray[Any]]],
    levels: Sequence[LevelTargets],
    constants: FocalConstants,
    rules: LossRules,
    requests: Sequence[GradientRequest[NDArray[Any]] | None],
) -> TermSums | None:
    """Returns what `term_sums` does, of arrays of the host; None where the compiled kernels cannot."""
    head = _head(preds, levels, map(in_rows, _arrays_of(levels)), rules, requests)
    cls = focal_sums_natively(head.grids, constants)
    reg = row_sums_natively(head.boxes, rules.box_formula)
    entropies = row_sums_natively(head.centerness, RowFormula.CENTERNESS)
    if cls is None or reg is None or entropies is None:
        return None
    return _together(cls, reg, entropies)


def nonzero_rows(levels: Sequence[LevelTargets], rules: LossRules) -> dict[str, list[NDArray[np.int64]]]:
    """Returns by name the predictions that have a gradient at some places alone, with those of each level."""
    positives = [targets.places for targets in levels]
    return dict.fromkeys(PREDICTIONS[1:] if rules.background else PREDICTIONS, positives)


class _Head(NamedTuple, Generic[A]):
    """What the kernels work on, one of each a level."""

    grids: list[FocalGrid[A]]
    boxes: list[RowGroup[A]]
    centerness: list[RowGroup[A]]


def _head(
    preds: Sequence[Sequence[A]],
    levels: Sequence[LevelTargets],
    targets: Iterable[A],
    rules: LossRules,
    requests: Sequence[GradientRequest[A] | None],
) -> _Head[A]:
    """Returns the problems of a head; gradients at locations without an object are made exactly zero.

    Args as for `term_sums`, and `targets`, the arrays of the levels where the predictions are.
    """
    for request in requests[1:]:
        clear(() if request is None else request.buffers)
    head: _Head[A] = _Head(grids=[], boxes=[], centerness=[])
    there = iter(targets)
    for i, level in enumerate(levels):
        labels, ignored = next(there), None if level.ignored is None else next(there)
        gradient, scale = _wanted(requests[0], i)
        head.grids.append(
            FocalGrid(
                logits=preds[0][i],
                labels=labels,
                background=rules.background,
                ignored=ignored,
                gradient=gradient,
                scale=scale,
            )
        )
        places = next(there), next(there)
        head.boxes.append(_group(preds[1][i], next(there), places, _wanted(requests[1], i)))
        head.centerness.append(_group(preds[2][i], next(there), places, _wanted(requests[2], i)))
    return head


def _group(pred: A, targets: A, places: tuple[A, A], wanted: tuple[A | None, float]) -> RowGroup[A]:
    """Returns the positives of a level, given the image and the cell of each."""
    gradient, scale = wanted
    return RowGroup(
        preds=grid(pred),
        targets=targets,
        images=places[0],
        cells=places[1],
        gradient=None if gradient is None else grid(gradient),
        scale=scale,
    )


def _wanted(request: GradientRequest[A] | None, level: int) -> tuple[A | None, float]:
    """Returns where the gradient of a level goes, and what it is multiplied by."""
    return (None, 1.0) if request is None else (request.buffers[level], float(request.scales[level]))


def _arrays_of(levels: Sequence[LevelTargets]) -> list[NDArray[Any]]:
    """Returns the arrays of all levels in the order in which `_head` takes them."""
    found = []
    for level in levels:
        ignored = () if level.ignored is None else (level.ignored,)
        found += [level.labels, *ignored, level.image, level.cell, level.ltrb, level.centerness[:, None]]
    return found


def _together(cls: FocalSums, reg: RowSums, entropies: RowSums) -> TermSums:
    rows = (cls.losses, reg.losses, entropies.losses, reg.extras, entropies.extras)
    return TermSums(numbers=_stacked(rows), finite=cls.finite)


def _stacked(rows: Sequence[Numbers]) -> Numbers:
    tensors = [row for row in rows if isinstance(row, Tensor)]
    return torch.stack(tensors) if tensors else np.array(rows)
