"""The formulas, row by row and without reduction: pure functions of tensors.

Boxes and centerness are computed in float64: they are few beside the logits, and areas and their
differences cancel badly in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RowFormula = Callable[[Tensor, Tensor], Tensor]
"""Loss of each row from a prediction and a target, `[N, …]` each."""


def focal_terms(z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
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


def giou(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    """Returns the generalized IoU of matching xyxy boxes `[N, 4]` (Rezatofighi et al., 2019, alg. 1).

    Union and enclosing area are floored at `eps`. In -1..1 for upright boxes.
    """
    top_left = torch.max(pred[:, :2], target[:, :2])
    bottom_right = torch.min(pred[:, 2:], target[:, 2:])
    intersection = _area((bottom_right - top_left).clamp(min=0))
    union = _area(pred[:, 2:] - pred[:, :2]) + _area(target[:, 2:] - target[:, :2]) - intersection
    hull_top_left = torch.min(pred[:, :2], target[:, :2])
    hull_bottom_right = torch.max(pred[:, 2:], target[:, 2:])
    hull = _area(hull_bottom_right - hull_top_left)
    iou = intersection / union.clamp(min=eps)
    return iou - (hull - union) / hull.clamp(min=eps)


def ltrb_to_xyxy(ltrb: Tensor) -> Tensor:
    """Returns distances `[N, 4]` as boxes around a location at the origin."""
    return torch.cat([-ltrb[:, :2], ltrb[:, 2:]], dim=1)


def giou_of_ltrb(pred: Tensor, target: Tensor) -> Tensor:
    """Returns `1 - GIoU` of boxes given as distances from one location, `[N, 4]`.

    A GIoU does not change when both boxes move together, so the location itself is not needed.
    """
    return 1 - giou(ltrb_to_xyxy(pred), ltrb_to_xyxy(target), eps=1e-7)


def log_iou_of_ltrb(pred: Tensor, target: Tensor) -> Tensor:
    """Returns `-log(IoU)` of distances `[N, 4]`, union and IoU floored at 1e-7.

    The intersection is not floored at 0: with negative sides on both axes it is a false overlap, and
    the published source returns it so (see `negative_side_count`).
    """
    overlap = torch.min(pred, target)
    intersection = _area(overlap[:, :2] + overlap[:, 2:])
    union = _area(pred[:, :2] + pred[:, 2:]) + _area(target[:, :2] + target[:, 2:]) - intersection
    return -torch.log((intersection / union.clamp(min=1e-7)).clamp(min=1e-7))


def _area(extents: Tensor) -> Tensor:
    """Returns width times height, signs and all, of `[N, 2]`."""
    return extents[:, 0] * extents[:, 1]


def centerness_terms(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
    of_one, of_zero = torch.xlogy(targets, targets), torch.special.xlog1py(1 - targets, -targets)
    entropies: Tensor = -(of_one + of_zero)
    return entropies


def rows_and_slopes(formula: RowFormula, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of each row in float64, and its derivative by that row of `pred`."""
    leaf = pred.detach().double().requires_grad_()
    with torch.enable_grad():
        rows = formula(leaf, target.double())
        (slopes,) = torch.autograd.grad(rows.sum(), leaf)
    return rows.detach(), slopes
