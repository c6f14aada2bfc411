"""The formulas, row by row and without reduction: pure functions of tensors.

Boxes and centerness are computed in float64: they are few beside the logits, and areas and their
differences cancel badly in float32.
"""

from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]
"""The loss of each row, and its derivative by that row of the prediction."""


class RowFormula(Enum):
    """What is computed from a row of a prediction and its target."""

    GIOU = auto()
    """`giou_loss`."""
    GIOU_OF_LTRB = auto()
    """`giou_loss_of_ltrb`, and whether a predicted side is negative."""
    LOG_IOU_OF_LTRB = auto()
    """`log_iou_loss_of_ltrb`, and whether a predicted side is negative."""
    CENTERNESS = auto()
    """`centerness_terms` of `[N, 1]`, and the entropy of the target."""

    @property
    def numbers(self) -> int:
        """How many numbers a row has."""
        return 1 if self is RowFormula.CENTERNESS else 4


class RowTerms(NamedTuple):
    """Losses `[N]`, their derivatives `[N, K]`, and what else the formula tells of each row, `[N]`."""

    losses: Tensor
    slopes: Tensor
    extras: Tensor


def row_terms(formula: RowFormula, pred: Tensor, target: Tensor, floor: float) -> RowTerms:
    """Returns the terms of rows `[N, K]`, float64 both.

    Args:
        formula: Which.
        pred: Predictions.
        target: What they should be.
        floor: Least area, square pixels, and least IoU under a logarithm.
    """
    if formula is RowFormula.CENTERNESS:
        losses, slopes = centerness_terms(pred, target)
        return RowTerms(losses.squeeze(1), slopes, entropy(target).squeeze(1))
    if formula is RowFormula.GIOU:
        losses, slopes = giou_loss(pred, target, floor)
        return RowTerms(losses, slopes, torch.zeros_like(losses))
    of_ltrb = giou_loss_of_ltrb if formula is RowFormula.GIOU_OF_LTRB else log_iou_loss_of_ltrb
    return RowTerms(*of_ltrb(pred, target, floor), (pred < 0).any(dim=1).double())


def focal_terms(z: Tensor, gamma: float) -> Terms:
    """Returns `f(z) = σ(z)^γ · softplus(z)` and its derivative, elementwise.

    The focal loss of a negative with logit x is `(1 - α) f(x)`, that of a positive `α f(-x)` (Lin
    et al., 2017, eq. 5). Everything comes from `e = exp(-|z|)`, so that neither σ(z) nor 1 - σ(z)
    is ever a difference: both keep full relative precision, and all is finite for finite z.
    """
    e = torch.exp(-z.abs())
    large = torch.reciprocal(1 + e)
    small = e * large
    positive = z >= 0
    p = torch.where(positive, large, small)
    q = torch.where(positive, small, large)
    softplus = torch.log1p(e).add_(z.clamp(min=0))
    modulator = p**gamma
    slope = (q.mul_(gamma).mul_(softplus)).add_(p).mul_(modulator)
    return modulator.mul_(softplus), slope


def giou_loss(pred: Tensor, target: Tensor, eps: float) -> Terms:
    """Returns `1 - GIoU` of matching xyxy boxes `[N, 4]` (Rezatofighi et al., 2019, alg. 1).

    Union and enclosing area are floored at `eps`. In 0..2 for upright boxes.
    """
    low, high = _halves(pred)
    target_low, target_high = _halves(target)
    extent, overlap = high - low, torch.min(high, target_high) - torch.max(low, target_low)
    inside = overlap.clamp(min=0)
    hull_extent = torch.max(high, target_high) - torch.min(low, target_low)
    intersection, hull = _area(inside), _area(hull_extent)
    union = _area(extent) + _area(target_high - target_low) - intersection
    floored_union, floored_hull = union.clamp(min=eps), hull.clamp(min=eps)
    iou, wasted = intersection / floored_union, (hull - union) / floored_hull
    by_area = iou / floored_union * (union >= eps) - 1 / floored_hull
    by_intersection = -1 / floored_union - by_area
    by_hull = (1 - wasted * (hull >= eps)) / floored_hull
    by_extent = by_area * extent.flip(0)
    by_overlap = by_intersection * inside.flip(0) * (overlap >= 0)
    by_hull_extent = by_hull * hull_extent.flip(0)
    high_above, low_above = _share_above(high, target_high), _share_above(low, target_low)
    by_high = by_extent + by_overlap * (1 - high_above) + by_hull_extent * high_above
    by_low = -by_extent - by_overlap * low_above - by_hull_extent * (1 - low_above)
    return 1 - iou + wasted, torch.cat([by_low, by_high]).t()


def giou_loss_of_ltrb(pred: Tensor, target: Tensor, eps: float) -> Terms:
    """Returns `1 - GIoU` of boxes given as distances from one location, `[N, 4]`.

    A GIoU does not change when both boxes move together, so the location itself is not needed.
    """
    signs = pred.new_tensor([-1, -1, 1, 1])
    rows, slopes = giou_loss(pred * signs, target * signs, eps)
    return rows, slopes * signs


def log_iou_loss_of_ltrb(pred: Tensor, target: Tensor, eps: float) -> Terms:
    """Returns `-log(IoU)` of distances `[N, 4]`, union and IoU floored at `eps`.

    The intersection is not floored at 0: with negative sides on both axes it is a false overlap, and
    the published source returns it so (see `Evaluation.negative_side_count`).
    """
    low, high = _halves(pred)
    target_low, target_high = _halves(target)
    extent, overlap = low + high, torch.min(low, target_low) + torch.min(high, target_high)
    intersection = _area(overlap)
    union = _area(extent) + _area(target_low + target_high) - intersection
    floored_union = union.clamp(min=eps)
    iou = intersection / floored_union
    by_iou = torch.where(iou >= eps, -1 / iou, 0)
    union_share = iou / floored_union * (union >= eps)
    by_extent = -by_iou * union_share * extent.flip(0)
    by_overlap = by_iou * (1 / floored_union + union_share) * overlap.flip(0)
    by_low = by_extent + by_overlap * (1 - _share_above(low, target_low))
    by_high = by_extent + by_overlap * (1 - _share_above(high, target_high))
    return -torch.log(iou.clamp(min=eps)), torch.cat([by_low, by_high]).t()


def _halves(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first two and the last two numbers of `[N, 4]`, `[2, N]` each."""
    columns = boxes.t().contiguous()
    return columns[:2], columns[2:]


def _area(extents: Tensor) -> Tensor:
    """Returns width times height, signs and all, of `[2, N]`."""
    return extents[0] * extents[1]


def _share_above(a: Tensor, b: Tensor) -> Tensor:
    """Returns a's share in the derivative of `max(a, b)`: 1 above, 0 below, and half where they are equal."""
    return (torch.sign(a - b) + 1) / 2


def centerness_terms(logits: Tensor, targets: Tensor) -> Terms:
    """Returns the binary cross-entropy of logits x with targets t in 0..1, and its derivative `σ(x) - t`.

    `(x > 0 ? 1 - t : -t) · x + log1p(exp(-|x|))` is a sum of two terms that are not negative: a
    confident and correct logit loses no digits.
    """
    e = torch.exp(-logits.abs())
    small = e / (1 + e)
    positive = logits > 0
    loss = torch.where(positive, 1 - targets, -targets) * logits + torch.log1p(e)
    return loss, torch.where(positive, (1 - targets) - small, small - targets)


def entropy(targets: Tensor) -> Tensor:
    """Returns `-t log t - (1 - t) log(1 - t)`: the cross-entropy of a perfect prediction."""
    least = torch.finfo(targets.dtype).tiny  # 0 · log 0 is 0 here
    rest = 1 - targets
    return -(targets * targets.clamp(min=least).log() + rest * rest.clamp(min=least).log())
