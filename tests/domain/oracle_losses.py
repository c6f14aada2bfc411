"""The losses over again, one element at a time in float64, from the definitions and from no product code.

Everything takes numpy arrays (or whatever `numpy.asarray` takes) and returns Python floats and numpy arrays.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.7)
ALPHAS = (0.25, 0.0, 1.0, None, -1.0)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))
TINY = float(np.finfo(np.float32).tiny)
"""Below the smallest normal float32 relative precision is nobody's promise."""


def assert_close(actual, expected, *, rtol=1e-6, atol=TINY):
    """Asserts equality element by element to a relative tolerance."""
    actual = actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def numpy_of(tensor):
    """Returns a tensor as float64 numpy: half-precision values as they were rounded."""
    return tensor.detach().double().numpy()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def focal_element(x: float, *, positive: bool, alpha, gamma) -> tuple[float, float]:
    """Returns `-α_t (1 - p_t)^γ log(p_t)` and its derivative by x (Lin et al., appendix B)."""
    off = alpha is None or alpha < 0
    alpha_t = 1.0 if off else (alpha if positive else 1 - alpha)
    sign = 1 if positive else -1
    p_t, miss, log_p_t = sigmoid(sign * x), sigmoid(-sign * x), log_sigmoid(sign * x)
    weight = alpha_t * miss**gamma
    return -weight * log_p_t, sign * weight * (gamma * p_t * log_p_t - miss)


def focal(logits, labels, *, alpha=0.25, gamma=2.0, background=False):
    """Returns rows in the shape of `labels` and slopes in that of `logits`, `[N, C]` or `[N, C, H, W]`."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    last = np.moveaxis(logits, 1, -1)
    rows, slopes = np.zeros(labels.shape), np.zeros(last.shape)
    for at in np.ndindex(labels.shape):
        if labels[at] < 0 and not background:
            continue
        for c in range(last.shape[-1]):
            value, slope = focal_element(
                float(last[*at, c]), positive=bool(labels[at] == c), alpha=alpha, gamma=gamma
            )
            rows[at] += value
            slopes[*at, c] = slope
    return rows, np.moveaxis(slopes, -1, 1)


def focal_loss(logits, labels, reduction, **constants):
    """Returns the reduced loss and the gradient of its sum."""
    rows, slopes = focal(logits, labels, **constants)
    kept = np.asarray(labels) >= 0
    if not kept.any():
        return 0.0, slopes
    if reduction == "mean":
        return rows[kept].mean(), slopes / kept.sum()
    return (rows.sum() if reduction == "sum" else rows[kept]), slopes


def area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def giou_loss(a: Sequence[float], b: Sequence[float], eps: float = 1e-7) -> float:
    """Returns `1 - GIoU` of two xyxy boxes."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = area(a) + area(b) - width * height
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return 1 - (width * height / max(union, eps) - (hull - union) / max(hull, eps))


def log_iou_loss(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns `-log IoU` of two boxes given as l, t, r, b from one place, without a floor on overlap."""
    overlap = (min(a[0], b[0]) + min(a[2], b[2])) * (min(a[1], b[1]) + min(a[3], b[3]))
    union = (a[0] + a[2]) * (a[1] + a[3]) + (b[0] + b[2]) * (b[1] + b[3]) - overlap
    return -math.log(max(overlap / max(union, 1e-7), 1e-7))


def slope_of(loss: Callable[..., float], a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Returns the derivative of `loss(a, b)` by `a`, by central differences."""
    slopes = []
    for side in range(4):
        step = 1e-5 * max(abs(a[side]), 1.0)
        above, below = list(a), list(a)
        above[side] += step
        below[side] -= step
        slopes.append((loss(above, b) - loss(below, b)) / (above[side] - below[side]))
    return slopes


def bce(x: float, t: float) -> tuple[float, float]:
    """Returns the binary cross-entropy of a logit with a soft target, and its derivative."""
    return -t * log_sigmoid(x) - (1 - t) * log_sigmoid(-x), (1 - t) * sigmoid(x) - t * sigmoid(-x)


def entropy(t: float) -> float:
    return -sum(share * math.log(share) for share in (t, 1 - t) if share > 0)


def assign(ground_truth, sizes, strides, ranges=RANGES):
    """Returns dense targets `[B, H, W]`, `[B, 4, H, W]`, `[B, H, W]` a level: the smallest fitting box."""
    levels = []
    for (height, width), stride, (low, high) in zip(sizes, strides, ranges, strict=False):
        labels = np.full((len(ground_truth), height, width), -1)
        ltrb = np.zeros((len(ground_truth), 4, height, width))
        centerness = np.zeros((len(ground_truth), height, width))
        for image, i, j in np.ndindex(labels.shape):
            smallest = math.inf
            x, y = (j + 0.5) * stride, (i + 0.5) * stride
            for box, label in zip(*ground_truth[image], strict=True):
                sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
                if min(sides) > 0 and low <= max(sides) < high and area(box) < smallest:
                    smallest = area(box)
                    labels[image, i, j] = label
                    ltrb[image, :, i, j] = sides
                    centerness[image, i, j] = centerness_of(*sides)
        levels.append((labels, ltrb, centerness))
    return [list(maps) for maps in zip(*levels, strict=True)]


def centerness_of(left: float, top: float, right: float, bottom: float) -> float:
    across, down = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
    return math.sqrt(across * down)


def fcos(preds, targets, *, preset, strides, alpha=0.25, gamma=2.0, weights=(1, 1, 1), normalizer=None):
    """Returns the components and the total, and the total's gradients, each one array a level."""
    positives = [np.argwhere(labels >= 0) for labels in targets[0]]
    n = max(sum(map(len, positives)), 1) if normalizer is None else normalizer
    sums, gradients = np.zeros(3), ([], [], [])
    for level, stride in enumerate(strides):
        logits, reg, ctr = (preds[term][level] for term in range(3))
        labels, reg_target, ctr_target = (targets[term][level] for term in range(3))
        count = max(len(positives[level]), 1)
        documented = preset == "documented"
        divisors = (n, n, n) if documented else (count, n, n * count)
        rows, slopes = focal(logits, labels, alpha=alpha, gamma=gamma, background=documented)
        sums[0] += rows.sum() / divisors[0]
        maps = slopes, np.zeros(reg.shape), np.zeros(ctr.shape)
        for b, i, j in positives[level]:
            a, t = reg[b, :, i, j], reg_target[b, :, i, j]
            loss = at_location(giou_loss, i, j, stride) if documented else log_iou_loss
            sums[1] += loss(a, t) / divisors[1]
            maps[1][b, :, i, j] = slope_of(loss, a, t)
            value, maps[2][b, 0, i, j] = bce(ctr[b, 0, i, j], ctr_target[b, i, j])
            sums[2] += value / divisors[2]
        for term in range(3):
            gradients[term].append(weights[term] * maps[term] / divisors[term])
    weighted = sums * weights
    names = ("cls_loss", "reg_loss", "centerness_loss")
    values = dict(zip(names, sums if preset == "documented" else weighted, strict=True))
    return {**values, "loss": weighted.sum(), "total_loss": weighted.sum()}, gradients


def at_location(loss: Callable[..., float], row: int, column: int, stride: int) -> Callable[..., float]:
    """Returns a loss of boxes as a loss of distances from the centre of a cell."""
    x, y = (column + 0.5) * stride, (row + 0.5) * stride

    def of_distances(a, b):
        return loss(*([x - d[0], y - d[1], x + d[2], y + d[3]] for d in (a, b)))

    return of_distances


def head(rng, sizes, *, batch=2, classes=3, dtype=torch.float32, requires_grad=True):
    """Returns random head outputs: logits, distances of 1 to 100 px, centerness logits."""
    makers = (
        (classes, lambda shape: rng.normal(0, 2, shape)),
        (4, lambda shape: np.exp(rng.uniform(0, 4.6, shape))),
        (1, lambda shape: rng.normal(0, 2, shape)),
    )
    return [
        [
            torch.tensor(make((batch, channels, *size)), dtype=dtype, requires_grad=requires_grad)
            for size in sizes
        ]
        for channels, make in makers
    ]


def dense_targets(rng, sizes, *, batch=2, classes=3, dtype=torch.float32):
    """Returns random dense targets, about half of them -1."""
    shapes = [(batch, *size) for size in sizes]
    return [
        [torch.tensor(np.maximum(rng.integers(-classes, classes, shape), -1)) for shape in shapes],
        [
            torch.tensor(np.exp(rng.uniform(0, 4.6, (shape[0], 4, *shape[1:]))), dtype=dtype)
            for shape in shapes
        ],
        [torch.tensor(rng.uniform(0, 1, shape), dtype=dtype) for shape in shapes],
    ]
