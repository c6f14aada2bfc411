"""Box losses and the centerness loss of single rows, in float64, as in `formulas.py`."""

import triton
import triton.language as tl

_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=_NAN_STAYS)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=_NAN_STAYS)


@triton.jit
def _share_above(a, b):
    """The share of a in the derivative of max(a, b)."""
    return tl.where(a > b, 1.0, tl.where(a < b, 0.0, 0.5))


@triton.jit
def giou_terms(l, t, r, b, left, top, right, bottom, floor):
    """`1 - GIoU` of distances from one place, areas floored, and its derivatives by the predicted ones."""
    width, height = l + r, t + b
    across, down = _least(l, left) + _least(r, right), _least(t, top) + _least(b, bottom)
    inside_across, inside_down = _largest(across, 0.0), _largest(down, 0.0)
    hull_across, hull_down = _largest(l, left) + _largest(r, right), _largest(t, top) + _largest(b, bottom)
    intersection, hull = inside_across * inside_down, hull_across * hull_down
    union = width * height + (left + right) * (top + bottom) - intersection
    floored_union, floored_hull = _largest(union, floor), _largest(hull, floor)
    iou, wasted = intersection / floored_union, (hull - union) / floored_hull
    by_area = tl.where(union >= floor, iou / floored_union, 0.0) - 1.0 / floored_hull
    by_intersection = -1.0 / floored_union - by_area
    by_hull = (1.0 - tl.where(hull >= floor, wasted, 0.0)) / floored_hull
    by_across = tl.where(across >= 0.0, by_intersection * inside_down, 0.0)
    by_down = tl.where(down >= 0.0, by_intersection * inside_across, 0.0)
    by_width, by_height = by_area * height, by_area * width
    by_hull_across, by_hull_down = by_hull * hull_down, by_hull * hull_across
    return (
        1.0 - iou + wasted,
        _by_side(l, left, by_width, by_across, by_hull_across),
        _by_side(t, top, by_height, by_down, by_hull_down),
        _by_side(r, right, by_width, by_across, by_hull_across),
        _by_side(b, bottom, by_height, by_down, by_hull_down),
    )


@triton.jit
def log_iou_terms(l, t, r, b, left, top, right, bottom, floor):
    """`-log(IoU)` of distances from one place, union and IoU floored, and its derivatives."""
    width, height = l + r, t + b
    across, down = _least(l, left) + _least(r, right), _least(t, top) + _least(b, bottom)
    intersection = across * down
    union = width * height + (left + right) * (top + bottom) - intersection
    floored_union = _largest(union, floor)
    iou = intersection / floored_union
    by_iou = tl.where(iou >= floor, -1.0 / iou, 0.0)
    union_share = tl.where(union >= floor, iou / floored_union, 0.0)
    by_area = -by_iou * union_share
    by_intersection = by_iou * (1.0 / floored_union + union_share)
    by_across, by_down = by_intersection * down, by_intersection * across
    return (
        -tl.log(_largest(iou, floor)),
        _by_side(l, left, by_area * height, by_across, 0.0),
        _by_side(t, top, by_area * width, by_down, 0.0),
        _by_side(r, right, by_area * height, by_across, 0.0),
        _by_side(b, bottom, by_area * width, by_down, 0.0),
    )


@triton.jit
def _by_side(side, target, by_extent, by_overlap, by_hull):
    above = _share_above(side, target)
    return by_extent + by_overlap * (1.0 - above) + by_hull * above


@triton.jit
def centerness_terms(x, t):
    """The binary cross-entropy of logits with soft targets, and its derivative."""
    e = tl.exp(-tl.abs(x))
    small = e / (1.0 + e)
    rest = 1.0 - t
    loss = tl.where(x > 0, rest, -t) * x + _log_of_one_plus(e)
    return loss, tl.where(x > 0, rest - small, small - t)


@triton.jit
def entropy(t):
    """`-t log t - (1 - t) log(1 - t)`."""
    rest = 1.0 - t
    return -(t * _log_of_share(t) + rest * _log_of_share(rest))


@triton.jit
def _log_of_share(t):
    return tl.log(tl.where(t == 0.0, 1.0, t))  # 0 · log 0 is 0 here


@triton.jit
def _log_of_one_plus(e):
    """log(1 + e) for e in 0..1: what 1 + e rounds away is made up for by the quotient (Kahan)."""
    sum_ = 1.0 + e
    rounded = sum_ - 1.0
    return tl.where(rounded == 0.0, e, tl.log(sum_) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
