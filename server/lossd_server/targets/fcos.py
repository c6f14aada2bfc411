"""The FCOS assigner as a caller configures it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.kernels import load_library
from lossd_server.targets.assignment import Assignment
from lossd_server.targets.box_format import BoxFormat
from lossd_server.targets.ground_truth import GroundTruth, Objects, read_objects
from lossd_server.targets.painting import paint_targets
from lossd_server.targets.presets import ASSIGNER_RULES, AssignerPreset
from lossd_server.targets.pyramid import MAX_LOCATIONS, Pyramid, feature_sizes, pyramid

DEFAULT_STRIDES = (8, 16, 32, 64, 128)
"""Pixels between neighbouring locations of P3 to P7."""

DEFAULT_RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, math.inf))
"""Range of the farthest side on P3 to P7, pixels."""

MAX_LEVELS = 64
"""Most levels of a pyramid."""


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
        object.__setattr__(self, "strides", tuple(self.strides))
        if self.regress_ranges is not None:
            object.__setattr__(self, "regress_ranges", tuple(map(tuple, self.regress_ranges)))
        if not 1 <= len(self.strides) <= MAX_LEVELS:
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"has {len(self.strides)} entries, want 1..{MAX_LEVELS}",
                field="strides",
                value=len(self.strides),
            )
        for level, stride in enumerate(self.strides):
            checks.require_number(f"strides[{level}]", stride, at_least=1, at_most=2**20, whole=True)
        if len(self.ranges) != len(self.strides):
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"has {len(self.ranges)} entries, want {len(self.strides)} as strides",
                field="regress_ranges",
                value=len(self.ranges),
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

    def for_levels(self, count: int) -> "FCOSAssigner":
        """Returns the assigner of the first levels, where strides and ranges are the default ones."""
        own_pyramid = self.regress_ranges is not None or self.strides != DEFAULT_STRIDES
        if own_pyramid or not 0 < count < len(self.strides):
            return self
        return replace(self, strides=self.strides[:count], regress_ranges=DEFAULT_RANGES[:count])

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
        load_library()
        return self.assign_objects(self.read(ground_truth, num_classes=num_classes), self.pyramid_of(sizes))

    def read(
        self, ground_truth: Sequence[GroundTruth | Mapping[str, Any]], *, num_classes: int | None = None
    ) -> list[Objects]:
        """Checks the objects of each image and returns them in the assigner's terms; see `assign`."""
        if isinstance(ground_truth, Mapping):
            raise InvalidInputError(
                Reason.INVALID_SHAPE, "is one mapping, want a list with one an image", field="ground_truth"
            )
        fields = [f"ground_truth[{index}]" for index in range(len(ground_truth))]
        return [
            self.read_image(GroundTruth.of(image, field), field, num_classes)
            for field, image in zip(fields, ground_truth, strict=True)
        ]

    def read_image(self, image: GroundTruth, field: str, num_classes: int | None = None) -> Objects:
        """Does the same with one image, whose path is `field` for errors."""
        return read_objects(image, self.box_format, field=field, num_classes=num_classes)

    def assign_objects(
        self,
        objects: Sequence[Objects],
        levels: Pyramid,
        *,
        max_positives: int | None = None,
    ) -> Assignment:
        """Assigns the locations of images whose objects were read before; see `assign`.

        Args:
            objects: Those of each image.
            levels: The locations; see `pyramid_of`.
            max_positives: More positives are refused; None is no limit.
        """
        return paint_targets(objects, levels, self.ranges, ASSIGNER_RULES[self.preset], max_positives)

    def pyramid_of(self, sizes: Sequence[tuple[int, int]], *, field: str = "feature_sizes") -> Pyramid:
        """Returns the levels of this assigner's strides that have these sizes.

        Args:
            sizes: Height and width of each level.
            field: What the sizes come from, for errors.

        Raises:
            InvalidInputError: There is not one size for each stride, or they are too large.
        """
        return _checked_pyramid(self.strides, tuple(map(tuple, sizes)), field)


@lru_cache(maxsize=256)
def _checked_pyramid(strides: tuple[int, ...], sizes: tuple[tuple[int, int], ...], field: str) -> Pyramid:
    """Returns the pyramid of strides on levels of these sizes, checked when first wanted."""
    checks.require_count("feature_sizes", len(sizes), "strides", len(strides))
    for level, size in enumerate(sizes):
        for axis, extent in zip(("height", "width"), size, strict=True):
            checks.require_number(f"feature_sizes[{level}].{axis}", extent, at_least=0, whole=True)
    # A side of 0 counts as 1: numpy makes no map of 0 by 2⁶².
    total = sum(max(int(height), 1) * max(int(width), 1) for height, width in sizes)
    if total > MAX_LOCATIONS:
        raise InvalidInputError(
            Reason.MESSAGE_TOO_LARGE,
            f"come to {total} locations, at most {MAX_LOCATIONS} are served",
            field=field,
            value=total,
            limit=MAX_LOCATIONS,
        )
    return pyramid(strides, sizes)
