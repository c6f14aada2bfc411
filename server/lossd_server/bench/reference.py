"""What the benchmark compares with: the specification's losses and assigner in their plain form.

Eager torch, one operation after the other, gradients by autograd, as a training script would have
them. Run in float64 they say how accurate each path is. Nothing here is part of the product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lossd_server.targets import DEFAULT_RANGES, DEFAULT_STRIDES

_EPS = 1e-7
_ALPHA, _GAMMA = 0.25, 2.0


class DenseTargets(NamedTuple):
    """Targets of one level: of one image `[H, W]`, `[4, H, W]`, `[H, W]`, or of a batch, stacked."""

    cls: Tensor
    reg: Tensor
    centerness: Tensor


class Predictions(NamedTuple):
    """What an FCOS head puts out, one tensor a level: `[B, C, H, W]`, `[B, 4, H, W]`, `[B, 1, H, W]`."""

    cls: list[Tensor]
    reg: list[Tensor]
    centerness: list[Tensor]


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean focal loss of `[B, C, H, W]` logits over the `[B, H, W]` labels that are not -1."""
    rows, classes = _class_rows(logits), labels.flatten()
    kept = classes >= 0
    rows, classes = rows[kept], classes[kept]
    one_hot = functional.one_hot(classes, rows.shape[1]).to(rows.dtype)
    return _focal_terms(rows, one_hot).sum(dim=1).mean()


def giou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Returns the mean of `1 - GIoU` over matching xyxy boxes `[N, 4]`."""
    return (1 - _giou(pred, target)).mean()


def centerness_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean binary cross-entropy of centerness logits."""
    return functional.binary_cross_entropy_with_logits(logits, target)


def fcos_autotimm(preds: Predictions, targets: Sequence[DenseTargets]) -> Tensor:
    """Returns the total loss of an FCOS head under the preset `autotimm`."""
    cls, reg, centerness, positives = [], [], [], 0
    for cls_pred, reg_pred, centerness_pred, target in zip(*preds, targets, strict=True):
        positive = target.cls >= 0
        if not positive.any():
            continue
        cls.append(focal_loss(cls_pred, target.cls))
        pred = reg_pred.permute(0, 2, 3, 1)[positive]
        reg.append(_log_iou(pred, target.reg.permute(0, 2, 3, 1)[positive]).sum())
        logits = centerness_pred.squeeze(1)[positive]
        centerness.append(centerness_loss(logits, target.centerness[positive]))
        positives += int(positive.sum())
    share = max(positives, 1)
    return _total(cls, preds) + _total(reg, preds) / share + _total(centerness, preds) / share


def fcos_documented(preds: Predictions, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Returns the total loss of an FCOS head under the preset `documented`, targets assigned on the way."""
    targets = assign_batch(boxes, labels, [(pred.shape[2], pred.shape[3]) for pred in preds.cls])
    terms, positives = [], 0
    levels = zip(*preds, targets, DEFAULT_STRIDES, strict=True)
    for cls_pred, reg_pred, centerness_pred, target, stride in levels:
        # Class C of C + 1 is the background, whose column is cut off: a row of zeros.
        classes = cls_pred.shape[1]
        shifted = torch.where(target.cls >= 0, target.cls, classes).flatten()
        one_hot = functional.one_hot(shifted, classes + 1)[:, :classes].to(cls_pred.dtype)
        terms.append(_focal_terms(_class_rows(cls_pred), one_hot).sum())
        positive = target.cls >= 0
        if not positive.any():
            continue
        height, width = cls_pred.shape[2:]
        x, y = points(height, width, stride, like=reg_pred)
        centres = torch.stack([x, y, x, y], dim=-1).expand(*positive.shape, 4)[positive]
        sign = reg_pred.new_tensor([-1, -1, 1, 1])
        pred = centres + sign * reg_pred.permute(0, 2, 3, 1)[positive]
        box = centres + sign * target.reg.permute(0, 2, 3, 1)[positive]
        terms.append((1 - _giou(pred, box)).sum())
        logits, wanted = centerness_pred.squeeze(1)[positive], target.centerness[positive]
        terms.append(functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"))
        positives += int(positive.sum())
    return torch.stack(terms).sum() / max(positives, 1)


def assign_batch(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> list[DenseTargets]:
    """Returns the targets of a batch, one entry a level: every image and level on its own, then stacked."""
    images = [assign_all_pairs(*image, sizes) for image in zip(boxes, labels, strict=True)]
    return [DenseTargets(*map(torch.stack, zip(*level, strict=True))) for level in zip(*images, strict=True)]


def assign_all_pairs(boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]) -> list[DenseTargets]:
    """Returns the FCOS targets of one image: on each level, every location against every box.

    Args:
        boxes: `[N, 4]` xyxy, pixels; N may be 0.
        labels: `[N]`.
        sizes: Height and width of each of the five default levels.
    """
    levels = zip(sizes, DEFAULT_STRIDES, DEFAULT_RANGES, strict=True)
    return [_assign_level(boxes, labels, *level) for level in levels]


def points(height: int, width: int, stride: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x and y of the locations of a level, `[H, W]` each, in the type and place of `like`."""
    rows = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) * stride
    columns = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) * stride
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y


def _assign_level(
    boxes: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    stride: int,
    bounds: tuple[float, float],
) -> DenseTargets:
    x, y = (axis.reshape(-1, 1) for axis in points(*size, stride, like=boxes))
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    if not len(boxes):
        empty = boxes.new_zeros(5, *size)
        return DenseTargets(labels.new_full(size, -1), empty[:4], empty[4])
    ltrb = torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=-1)  # [H·W, N, 4]
    farthest = ltrb.amax(dim=-1)
    takes = (ltrb.amin(dim=-1) > 0) & (bounds[0] <= farthest) & (farthest < bounds[1])
    area = ((x2 - x1) * (y2 - y1)).expand(len(x), -1).masked_fill(~takes, torch.inf)
    smallest, box = area.min(dim=1)
    taken = torch.isfinite(smallest)
    cls = torch.where(taken, labels[box], -1)
    reg = torch.where(taken[:, None], ltrb[torch.arange(len(box), device=box.device), box], 0)
    left, top, right, bottom = reg.unbind(dim=1)
    across = torch.min(left, right) / torch.max(left, right).clamp(min=_EPS)
    down = torch.min(top, bottom) / torch.max(top, bottom).clamp(min=_EPS)
    centerness = torch.sqrt(across * down)
    return DenseTargets(cls.reshape(size), reg.t().reshape(4, *size), centerness.reshape(size))


def _class_rows(logits: Tensor) -> Tensor:
    return logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])


def _focal_terms(logits: Tensor, one_hot: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    pt = p * one_hot + (1 - p) * (1 - one_hot)
    alpha_t = _ALPHA * one_hot + (1 - _ALPHA) * (1 - one_hot)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    return alpha_t * (1 - pt) ** _GAMMA * cross_entropy


def _giou(pred: Tensor, target: Tensor) -> Tensor:
    overlap = torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])
    intersection = overlap.clamp(min=0).prod(dim=1)
    areas = (pred[:, 2:] - pred[:, :2]).prod(dim=1) + (target[:, 2:] - target[:, :2]).prod(dim=1)
    union = areas - intersection
    hull = torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])
    enclosing = hull.prod(dim=1)
    return intersection / union.clamp(min=_EPS) - (enclosing - union) / enclosing.clamp(min=_EPS)


def _log_iou(pred: Tensor, target: Tensor) -> Tensor:
    overlap = torch.min(pred, target)
    intersection = (overlap[:, 0] + overlap[:, 2]) * (overlap[:, 1] + overlap[:, 3])
    pred_area = (pred[:, 0] + pred[:, 2]) * (pred[:, 1] + pred[:, 3])
    target_area = (target[:, 0] + target[:, 2]) * (target[:, 1] + target[:, 3])
    union = pred_area + target_area - intersection
    return -torch.log((intersection / union.clamp(min=_EPS)).clamp(min=_EPS))


def _total(terms: Sequence[Tensor], preds: Predictions) -> Tensor:
    """Returns the sum of some levels' terms, 0 where there are none."""
    return torch.stack(list(terms)).sum() if terms else preds.cls[0].new_zeros(())
