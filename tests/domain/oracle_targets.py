"""FCOS assignment written twice, as slowly as its definition reads, for the tests to compare with.

`by_loops` asks every box at every location, one scalar at a time; `all_pairs` does the same with whole
arrays and is quick enough for real images. Neither shares code with the product.
"""

import math
from typing import NamedTuple

import numpy as np

WIDE = {"float64", "int32", "int64", "uint32", "uint64"}


class Level(NamedTuple):
    """One image on one level: labels, matched, centerness, ignored `[H, W]` and ltrb `[4, H, W]`."""

    labels: np.ndarray
    matched: np.ndarray
    ltrb: np.ndarray
    centerness: np.ndarray
    ignored: np.ndarray


def real_type(boxes):
    """The type distances are computed in: boxes of a type that float32 cannot hold need float64."""
    return np.float64 if boxes.dtype.name in WIDE else np.float32


def nothing(height, width):
    return Level(
        labels=np.full((height, width), -1, np.int64),
        matched=np.full((height, width), -1, np.int64),
        ltrb=np.zeros((4, height, width), np.float32),
        centerness=np.zeros((height, width), np.float32),
        ignored=np.zeros((height, width), np.bool_),
    )


def by_loops(boxes, labels, iscrowd, strides, ranges, sizes):
    """Returns a `Level` for each stride; boxes `[N, 4]` xyxy of any type."""
    with np.errstate(over="ignore", invalid="ignore"):
        corners = boxes.astype(real_type(boxes))
        return [
            _level_by_loops(corners, labels, iscrowd, stride, ends, size)
            for stride, ends, size in zip(strides, ranges, sizes, strict=True)
        ]


def _level_by_loops(corners, labels, iscrowd, stride, ends, size):
    real = corners.dtype.type
    lowest, highest = real(ends[0]), real(ends[1])
    level = nothing(*size)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = real((column + 0.5) * stride), real((row + 0.5) * stride)
            best, best_area, in_crowd = None, None, False
            for n, (x1, y1, x2, y2) in enumerate(corners):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                if not min(sides) > 0:
                    continue
                if iscrowd[n]:
                    in_crowd = True
                    continue
                if not lowest <= max(sides) < highest:
                    continue
                area = (x2 - x1) * (y2 - y1)
                if best is None or area < best_area:
                    best, best_area, best_sides = n, area, sides
            if best is None:
                level.ignored[row, column] = in_crowd
                continue
            level.labels[row, column] = labels[best]
            level.matched[row, column] = best
            level.ltrb[:, row, column] = best_sides
            level.centerness[row, column] = _centerness(real, *best_sides)
    return level


def _centerness(real, left, top, right, bottom):
    floor = real(1e-7)
    across = min(left, right) / max(left, right, floor)
    down = min(top, bottom) / max(top, bottom, floor)
    return np.sqrt(across * down)


def all_pairs(boxes, labels, iscrowd, strides, ranges, sizes):
    """Returns what `by_loops` does, from arrays of all boxes by all locations."""
    with np.errstate(over="ignore", invalid="ignore"):
        corners = boxes.astype(real_type(boxes))
        return [
            _level_all_pairs(corners, labels, iscrowd, stride, ends, size)
            for stride, ends, size in zip(strides, ranges, sizes, strict=True)
        ]


def _level_all_pairs(corners, labels, iscrowd, stride, ends, size):
    level = nothing(*size)
    if not len(corners) or not math.prod(size):
        return level
    real = corners.dtype.type
    y, x = ((np.indices(size) + 0.5) * stride).astype(real)
    x1, y1, x2, y2 = (corners[:, side, None, None] for side in range(4))
    sides = np.stack([x - x1, y - y1, x2 - x, y2 - y])  # [4, N, H, W]
    inside = sides.min(axis=0) > 0
    farthest = sides.max(axis=0)
    crowd = iscrowd[:, None, None]
    takes = inside & ~crowd & (farthest >= real(ends[0])) & (farthest < real(ends[1]))
    areas = ((x2 - x1) * (y2 - y1))[:, 0, 0]
    order = np.argsort(areas, kind="stable")  # smallest first, equal ones as given
    first = takes[order].argmax(axis=0)
    best = np.where(takes.any(axis=0), order[first], -1)
    positive = best >= 0
    rows, columns = np.nonzero(positive)
    level.matched[...] = best
    level.labels[positive] = labels[best[positive]]
    level.ignored[...] = (inside & crowd).any(axis=0) & ~positive
    left, top, right, bottom = ltrb = sides[:, best[positive], rows, columns]
    level.ltrb[:, positive] = ltrb
    across = np.minimum(left, right) / np.maximum(np.maximum(left, right), real(1e-7))
    down = np.minimum(top, bottom) / np.maximum(np.maximum(top, bottom), real(1e-7))
    level.centerness[positive] = np.sqrt(across * down)
    return level
