"""The locations of a feature pyramid, in one flat row: level by level, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_LOCATIONS = 2**28
"""Most locations of one image's pyramid; an index must fit 32 bits with room for the batch."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pyramid:
    """The levels of a feature pyramid; one is equal to itself alone.

    Attributes:
        strides: Pixels between neighbouring locations, `[L]` int64.
        heights: Rows of each level, `[L]` int64.
        widths: Columns of each level, `[L]` int64.
        starts: Where each level begins in the flat row of locations, `[L + 1]` int64; the last is
            the number of locations.
        location_count: Number of locations over all levels.
    """

    strides: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    starts: NDArray[np.int64]
    location_count: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level."""
        return list(zip(self.heights.tolist(), self.widths.tolist(), strict=True))

    def level_of(self, location: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the level of each flat location."""
        return np.searchsorted(self.starts, location, side="right") - 1

    def cells_of(
        self, location: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Returns level, row and column of each flat location."""
        level = self.level_of(location)
        row, column = np.divmod(location - self.starts[level], np.maximum(self.widths[level], 1))
        return level, row, column


def pyramid(strides: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Pyramid:
    """Returns the pyramid of these strides and level sizes."""
    heights = np.array([height for height, _ in sizes], np.int64)
    widths = np.array([width for _, width in sizes], np.int64)
    starts = np.concatenate([[0], np.cumsum(heights * widths)]).astype(np.int64)
    return Pyramid(
        strides=np.array(strides, np.int64),
        heights=heights,
        widths=widths,
        starts=starts,
        location_count=int(starts[-1]),
    )


def feature_sizes(image_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Returns `ceil(size / stride)` for each stride: the level sizes of an image of (height, width)."""
    height, width = image_size
    return [(-(-height // stride), -(-width // stride)) for stride in strides]
