"""The FCOS assigner (Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", 2019, §3).

Each location takes the smallest box that it lies strictly inside of and whose farthest side is
within the level's range. Boxes are painted from large to small, each over just the cells it can
reach, so that time and memory follow what boxes cover and not locations × boxes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.targets.assignment import Assignment
from lossd_server.targets.ground_truth import BoxFormat, GroundTruth, Objects, read_objects
from lossd_server.targets.presets import ASSIGNER_RULES, AssignerPreset, AssignerRules
from lossd_server.targets.pyramid import MAX_LOCATIONS, Pyramid, feature_sizes, pyramid

DEFAULT_STRIDES = (8, 16, 32, 64, 128)
"""Pixels between neighbouring locations of P3 to P7."""

DEFAULT_RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, math.inf))
"""Range of the farthest side on P3 to P7, pixels."""

MAX_LEVELS = 64
"""Most levels of a pyramid."""

_PAIRS_AT_ONCE = 1 << 19
"""Pairs of box and cell looked at together: about 30 MB of temporaries."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FCOSAssigner:
    """Assigns the locations of a feature pyramid to ground-truth boxes.

    Attributes:
        strides: Pixels between neighbouring locations, one a level, each at least 1.
        regress_ranges: `(min, max)` of the farthest side, pixels, one a level. None means the
            default ranges, which go with five strides.
        preset: Whose rules to follow.
        box_format: Layout of the boxes.
    """

    strides: tuple[int, ...] = DEFAULT_STRIDES
    regress_ranges: tuple[tuple[float, float], ...] | None = None
    preset: AssignerPreset = AssignerPreset.AUTOTIMM
    box_format: BoxFormat = BoxFormat.XYXY

    def __post_init__(self) -> None:
        """Refuses settings that do not go together with `InvalidInputError`."""
        if not 1 <= len(self.strides) <= MAX_LEVELS:
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"has {len(self.strides)} entries, want 1..{MAX_LEVELS}",
                field="strides",
                count=len(self.strides),
            )
        for level, stride in enumerate(self.strides):
            checks.require_number(f"strides[{level}]", stride, at_least=1, at_most=2**20)
        if len(self.ranges) != len(self.strides):
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"has {len(self.ranges)} entries, want {len(self.strides)} as strides",
                field="regress_ranges",
                count=len(self.ranges),
                expected=len(self.strides),
            )
        for level, (lower, upper) in enumerate(self.ranges):
            if not lower < upper:  # also refuses NaN
                raise InvalidInputError(
                    Reason.INVALID_OPTION,
                    f"is ({lower}, {upper}), want min < max",
                    field=f"regress_ranges[{level}]",
                    min=lower,
                    max=upper,
                )

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """The ranges in force."""
        return DEFAULT_RANGES if self.regress_ranges is None else self.regress_ranges

    def feature_sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Returns the (height, width) of each level for images of (height, width) pixels."""
        return feature_sizes(image_size, self.strides)

    def assign(
        self,
        ground_truth: Sequence[GroundTruth | Mapping[str, Any]],
        sizes: Sequence[tuple[int, int]],
        *,
        num_classes: int | None = None,
    ) -> Assignment:
        """Assigns the locations of a batch of images.

        Args:
            ground_truth: The objects of each image; numpy arrays or torch tensors.
            sizes: Height and width of each level, in locations.
            num_classes: Number of classes, or None where any label from 0 goes.

        Raises:
            InvalidInputError: Sizes do not go with the strides, or an image's objects are refused;
                the field is `ground_truth[i].…`.
        """
        return self.assign_objects(self.read(ground_truth, num_classes=num_classes), sizes)

    def read(
        self, ground_truth: Sequence[GroundTruth | Mapping[str, Any]], *, num_classes: int | None = None
    ) -> list[Objects]:
        """Checks the objects of each image and returns them in the assigner's terms; see `assign`."""
        fields = (f"ground_truth[{index}]" for index in range(len(ground_truth)))
        return [
            read_objects(GroundTruth.of(image, field), self.box_format, field=field, num_classes=num_classes)
            for field, image in zip(fields, ground_truth, strict=True)
        ]

    def assign_objects(self, objects: Sequence[Objects], sizes: Sequence[tuple[int, int]]) -> Assignment:
        """Assigns the locations of images whose objects were read before; see `assign`."""
        self.check_sizes(sizes)
        levels = pyramid(self.strides, tuple((int(h), int(w)) for h, w in sizes))
        return _assign(objects, levels, self.ranges, ASSIGNER_RULES[self.preset])

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raises `InvalidInputError` unless there is a size for each stride, none of them negative."""
        checks.require_count("feature_sizes", len(sizes), "strides", len(self.strides))
        for level, size in enumerate(sizes):
            for axis, extent in zip(("height", "width"), size, strict=True):
                checks.require_number(f"feature_sizes[{level}].{axis}", extent, at_least=0)
        total = sum(height * width for height, width in sizes)
        if total > MAX_LOCATIONS:
            raise InvalidInputError(
                Reason.VALUE_OUT_OF_RANGE,
                f"come to {total} locations, at most {MAX_LOCATIONS} are served",
                field="feature_sizes",
                count=total,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Boxes:
    """The boxes of all images in one row, in the order in which they are painted."""

    corners: NDArray[Any]  # [M, 4] x1 y1 x2 y2
    image: Ints
    index: Ints  # among the boxes of the image
    labels: Ints

    def take(self, keep: NDArray[Any]) -> "_Boxes":
        return _Boxes(
            corners=self.corners[keep],
            image=self.image[keep],
            index=self.index[keep],
            labels=self.labels[keep],
        )


def _assign(
    objects: Sequence[Objects],
    levels: Pyramid,
    ranges: Sequence[tuple[float, float]],
    rules: AssignerRules,
) -> Assignment:
    boxes, crowd = _in_paint_order(objects, rules)
    bounds = np.array(ranges, np.float64).T
    painted = _paint(boxes, len(objects), levels, bounds, rules)
    flat = np.flatnonzero(painted >= 0)
    box = painted[flat]
    image, location = np.divmod(flat, max(levels.location_count, 1))
    level, row, column = levels.cells_of(location)
    ltrb = _distances(boxes.corners[box], levels.strides[level], row, column, rules.offset)
    ignored = None
    if len(crowd.image):
        everywhere = np.broadcast_to([[-np.inf], [np.inf]], bounds.shape)
        covered = _paint(crowd, len(objects), levels, everywhere, rules) >= 0
        ignored = (covered & (painted < 0)).reshape(len(objects), levels.location_count)
    return Assignment(
        pyramid=levels,
        batch_size=len(objects),
        image=image,
        location=location,
        labels=boxes.labels[box],
        matched=boxes.index[box],
        ltrb=np.stack(ltrb, axis=1).astype(np.float32),
        centerness=_centerness(*ltrb, rules.least_extent).astype(np.float32),
        ignored=ignored,
        unassigned=rules.unassigned,
    )


def _in_paint_order(objects: Sequence[Objects], rules: AssignerRules) -> tuple[_Boxes, _Boxes]:
    """Returns ordinary boxes from last to first choice, and crowd regions."""
    counts = [len(image.boxes) for image in objects]
    wide = any(image.boxes.dtype == np.float64 for image in objects)
    kind = np.float64 if wide else np.float32
    boxes = _Boxes(
        corners=np.concatenate([np.zeros((0, 4), kind), *(image.boxes for image in objects)]),
        image=np.repeat(np.arange(len(objects)), counts),
        index=np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in counts)]),
        labels=np.concatenate([np.zeros(0, np.int64), *(image.labels for image in objects)]),
    )
    iscrowd = np.concatenate([np.zeros(0, np.bool_), *(image.iscrowd for image in objects)])
    ordinary = np.flatnonzero(~iscrowd)
    width, height = (boxes.corners[ordinary, 2:] - boxes.corners[ordinary, :2]).T
    choice = np.argsort(rules.size_key(width, height), kind="stable")
    return boxes.take(ordinary[choice[::-1]]), boxes.take(np.flatnonzero(iscrowd))


def _paint(
    boxes: _Boxes,
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
    begin = 0
    while begin < len(windows):
        done = int(ends[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")), begin + 1)
        portion = windows[begin:end]
        sizes = cells[portion]
        window = np.repeat(portion, sizes)
        within = np.arange(len(window)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        down, across = np.divmod(within, columns.ravel()[window])
        box, level = np.divmod(window, columns.shape[1])
        yield box, level, row.ravel()[window] + down, column.ravel()[window] + across
        begin = end


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
