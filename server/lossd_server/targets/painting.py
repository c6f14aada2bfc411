"""FCOS target assignment (Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", 2019, §3).

Each location takes the smallest box that it lies strictly inside of and whose farthest side is
within the level's range. Boxes are painted from large to small, each over just the cells it can
reach, so that time and memory follow what boxes cover and not locations × boxes. By the compiled
painter where there is one, otherwise by numpy, to the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.targets.assignment import Assignment
from lossd_server.targets.boxes import Boxes, in_paint_order
from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.native_painting import Ranges, assign_natively
from lossd_server.targets.positives import Positives, joined, require_pairs, require_positives
from lossd_server.targets.presets import AssignerRules
from lossd_server.targets.pyramid import Pyramid

_PAIRS_AT_ONCE = 1 << 19
"""Pairs of box and cell looked at together: about 30 MB of temporaries."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def paint_targets(
    objects: Sequence[Objects],
    levels: Pyramid,
    ranges: Ranges,
    rules: AssignerRules,
    max_positives: int | None = None,
) -> Assignment:
    """Assigns a batch of images; none depends on its neighbours.

    Args:
        objects: Those of each image.
        levels: The locations.
        ranges: What each level regresses, pixels.
        rules: Whose rules to follow.
        max_positives: More positives are refused, by numpy of boxes of one type; None is no limit.

    Raises:
        InvalidInputError: Boxes reach too many locations, or too many are positive.
    """
    found = assign_natively(objects, levels, ranges, rules, max_positives)
    if found is None:
        found = _assign_by_numpy(objects, levels, ranges, rules, max_positives)
    return Assignment(
        pyramid=levels,
        batch_size=len(objects),
        found=found,
        ignored=_ignored(objects, levels, rules, found),
        unassigned=rules.unassigned,
    )


def _assign_by_numpy(
    objects: Sequence[Objects],
    levels: Pyramid,
    ranges: Ranges,
    rules: AssignerRules,
    max_positives: int | None,
) -> Positives:
    """Assigns images whose boxes have one type together."""
    types = list({image.boxes.dtype for image in objects}) or [np.dtype(np.float32)]
    groups = (in_paint_order(objects, kind, rules) for kind in types)
    return joined(
        [_assign_group(boxes, len(objects), levels, ranges, rules, max_positives) for boxes in groups]
    )


def _assign_group(
    boxes: Boxes,
    batch_size: int,
    levels: Pyramid,
    ranges: Ranges,
    rules: AssignerRules,
    max_positives: int | None,
) -> Positives:
    bounds = np.array(ranges, np.float64).T
    # Areas and distances of boxes near the end of float32 overflow to infinity, which orders well.
    with np.errstate(over="ignore"):
        painted = _paint(boxes, batch_size, levels, bounds, rules)
        flat = np.flatnonzero(painted >= 0)
        require_positives(len(flat), max_positives)
        box = painted[flat].astype(np.int64)
        image, location = np.divmod(flat, max(levels.location_count, 1))
        level, row, column = levels.cells_of(location)
        ltrb = _distances(boxes.corners[box], levels.strides[level], row, column, rules.offset)
        centerness = _centerness(*ltrb, rules.least_extent)
        return Positives(
            labels=boxes.labels[box],
            cells=np.stack([image, level, row, column], axis=1).astype(np.int32),
            matched=boxes.index[box].astype(np.int32),
            ltrb=np.stack(ltrb, axis=1).astype(np.float32),
            centerness=centerness.astype(np.float32),
            level_counts=np.bincount(level, minlength=len(levels.strides)),
        )


def _ignored(
    objects: Sequence[Objects], levels: Pyramid, rules: AssignerRules, positives: Positives
) -> Bools | None:
    """Returns the locations inside crowd regions that are not positive, None without such regions."""
    if all(found.iscrowd is None for found in objects):
        return None
    ignored = np.stack([_covered(found.crowd_boxes(), levels, rules) for found in objects])
    ignored[positives.places(levels)] = False
    return ignored


def _covered(corners: NDArray[Any], levels: Pyramid, rules: AssignerRules) -> Bools:
    """Returns which locations of one image lie strictly inside any of the boxes, `[locations]`.

    Marks the corners of each box's cells and sums twice: the cost is that of the locations, however
    many boxes there are.
    """
    parts = []
    for stride, (height, width) in zip(levels.strides.tolist(), levels.sizes, strict=True):
        x = (np.arange(width) + rules.offset) * stride
        y = (np.arange(height) + rules.offset) * stride
        left, top = np.searchsorted(x, corners[:, 0], "right"), np.searchsorted(y, corners[:, 1], "right")
        right, bottom = np.searchsorted(x, corners[:, 2]), np.searchsorted(y, corners[:, 3])
        right, bottom = np.maximum(left, right), np.maximum(top, bottom)
        marks = np.zeros((height + 1, width + 1), np.int64)
        for row, column, mark in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(marks, (row, column), mark)
        parts.append((marks.cumsum(0).cumsum(1)[:height, :width] > 0).ravel())
    return np.concatenate(parts)


def _paint(
    boxes: Boxes,
    batch_size: int,
    levels: Pyramid,
    bounds: NDArray[np.float64],
    rules: AssignerRules,
) -> NDArray[np.int32]:
    """Returns for each location of each image, flat, the last of `boxes` that it can take, or -1."""
    canvas = np.full(batch_size * levels.location_count, -1, np.int32)
    lower, upper = bounds = bounds.astype(boxes.corners.dtype)
    window = _reachable_cells(boxes.corners, levels, bounds, rules.offset)
    for box, level, row, column in _pairs(*window):
        ltrb = _distances(boxes.corners[box], levels.strides[level], row, column, rules.offset)
        left, top, right, bottom = ltrb
        inside = np.minimum(np.minimum(left, right), np.minimum(top, bottom)) > 0
        farthest = np.maximum(np.maximum(left, right), np.maximum(top, bottom))
        takes = inside & rules.in_range(farthest, lower[level], upper[level])
        cell = levels.starts[level] + row * levels.widths[level] + column
        target = boxes.image[box] * levels.location_count + cell
        np.maximum.at(canvas, target[takes], box[takes].astype(np.int32))
    return canvas


def _reachable_cells(
    corners: NDArray[Any], levels: Pyramid, bounds: NDArray[np.float64], offset: float
) -> tuple[Ints, Ints, Ints, Ints]:
    """Returns first column, first row, columns and rows, `[M, L]` each, of the cells to look at.

    They hold all cells that a box can take: a location that is closer than the upper end to every
    side is within that distance of the opposite sides. Rounding outwards to whole cells, and the
    slack on the lower end, cover the rounding of distances in the boxes' own type.
    """
    x1, y1, x2, y2 = (corners.astype(np.float64)[:, side, None] for side in range(4))
    lower, upper = bounds.astype(np.float64)
    too_small = np.maximum(x2 - x1, y2 - y1) * (1 + 1e-6) < lower

    def window(low: NDArray[Any], high: NDArray[Any], extents: Ints) -> tuple[Ints, Ints]:
        first = np.floor(np.maximum(low, high - upper) / levels.strides - offset)
        last = np.ceil(np.minimum(high, low + upper) / levels.strides - offset)
        first = np.clip(first, 0, extents).astype(np.int64)
        last = np.clip(last, -1, extents - 1).astype(np.int64)
        return first, np.maximum(last - first + 1, 0)

    column, columns = window(x1, x2, levels.widths)
    row, rows = window(y1, y2, levels.heights)
    return column, row, np.where(too_small, 0, columns), rows


def _pairs(column: Ints, row: Ints, columns: Ints, rows: Ints) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
    """Yields box, level, row and column of every cell of every window, box by box, in portions."""
    cells = (columns * rows).ravel()
    windows = np.flatnonzero(cells)
    ends = np.cumsum(cells[windows])
    total = int(ends[-1]) if len(ends) else 0
    require_pairs(total)
    for begin in range(0, total, _PAIRS_AT_ONCE):
        end = min(begin + _PAIRS_AT_ONCE, total)
        first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end - 1, "right") + 1
        starts = ends[first:last] - cells[windows[first:last]]
        sizes = np.minimum(ends[first:last], end) - np.maximum(starts, begin)
        window = np.repeat(windows[first:last], sizes)
        within = np.arange(begin, end) - np.repeat(starts, sizes)
        down, across = np.divmod(within, columns.ravel()[window])
        box, level = np.divmod(window, columns.shape[1])
        yield box, level, row.ravel()[window] + down, column.ravel()[window] + across


def _distances(
    corners: NDArray[Any], stride: Ints, row: Ints, column: Ints, offset: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Returns l, t, r, b from the location of each cell to the sides of its box, in the boxes' type."""
    x = ((column + offset) * stride).astype(corners.dtype)
    y = ((row + offset) * stride).astype(corners.dtype)
    return x - corners[:, 0], y - corners[:, 1], corners[:, 2] - x, corners[:, 3] - y


def _centerness(
    left: NDArray[Any],
    top: NDArray[Any],
    right: NDArray[Any],
    bottom: NDArray[Any],
    least: float,
) -> NDArray[Any]:
    """Returns `sqrt(min(l,r)/max(l,r) · min(t,b)/max(t,b))` (FCOS, eq. 3)."""
    across = np.minimum(left, right) / np.maximum(np.maximum(left, right), left.dtype.type(least))
    down = np.minimum(top, bottom) / np.maximum(np.maximum(top, bottom), top.dtype.type(least))
    centerness: NDArray[Any] = np.sqrt(across * down)
    return centerness
