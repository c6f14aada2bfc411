"""What an assignment came to, and the two forms in which it is handed out."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd_server.targets.positives import Positives
from lossd_server.targets.pyramid import Pyramid

# Classes are int64, distances and centerness float32, image, level, row and column int32.
_BYTES_OF_LOCATION = 8 + 4 * 4 + 4
_BYTES_OF_CELL = 4 * 4
BYTES_OF_POSITIVE = _BYTES_OF_LOCATION + _BYTES_OF_CELL + 4
"""What one positive location takes in the sparse form."""

_NO_CELLS = np.empty((0, 4), np.int32)

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class DenseLevel(NamedTuple):
    """Targets for every location of one level.

    Attributes:
        cls: Class, `[B, H, W]` int64; the preset's label where no box was assigned.
        reg: Distances l, t, r, b in pixels, `[B, 4, H, W]` float32; 0 where unassigned.
        centerness: `[B, H, W]` float32; 0 where unassigned.
        ignored: True where a location lies in a crowd region and took no box, `[B, H, W]` bool;
            None when there is no crowd region.
    """

    cls: Ints
    reg: Floats
    centerness: Floats
    ignored: NDArray[np.bool_] | None


class SparseTargets(NamedTuple):
    """The positive locations, ordered by image, level, row, column.

    Attributes:
        locations: Image, level, row and column of each, `[P, 4]` int32.
        labels: Class of each, `[P]` int64.
        ltrb: Distances l, t, r, b of each in pixels, `[P, 4]` float32.
        centerness: Of each, `[P]` float32.
        matched: Index of each one's box among the boxes of its image, `[P]` int32.
        ignored: Image, level, row and column of each ignored location, `[Q, 4]` int32.
    """

    locations: NDArray[np.int32]
    labels: Ints
    ltrb: Floats
    centerness: Floats
    matched: NDArray[np.int32]
    ignored: NDArray[np.int32]


class Assignment(NamedTuple):
    """The positive locations of B images on one pyramid.

    Attributes:
        pyramid: The levels.
        batch_size: Number of images B.
        found: The positives.
        ignored: Locations in crowd regions that took no box, `[B, locations]` bool; None when there
            is no crowd region.
        unassigned: The label of every other location.
    """

    pyramid: Pyramid
    batch_size: int
    found: Positives
    ignored: NDArray[np.bool_] | None
    unassigned: int

    @property
    def positive_count(self) -> int:
        """Number of positives."""
        return len(self.found.labels)

    def positive_counts(self) -> list[int]:
        """Returns the number of positives of each level."""
        counts: list[int] = self.found.level_counts.tolist()
        return counts

    def label_map(self) -> Ints:
        """Returns the class of every location, `[B, locations]`."""
        labels = np.full((self.batch_size, self.pyramid.location_count), self.unassigned, np.int64)
        labels[self.found.places(self.pyramid)] = self.found.labels
        return labels

    @property
    def location_count(self) -> int:
        """Number of locations of all images."""
        return self.batch_size * self.pyramid.location_count

    @property
    def dense_bytes(self) -> int:
        """What the targets of every location take."""
        return self.location_count * (_BYTES_OF_LOCATION + (0 if self.ignored is None else 1))

    def sparse(self) -> SparseTargets:
        """Returns the positives alone."""
        found = self.found
        return SparseTargets(
            locations=found.cells,
            labels=found.labels,
            ltrb=found.ltrb,
            centerness=found.centerness,
            matched=found.matched,
            ignored=self._ignored_cells(),
        )

    def dense(self) -> list[DenseLevel]:
        """Returns the targets of every location, level by level."""
        return [self._dense_level(level, span) for level, span in enumerate(self._level_spans())]

    def _dense_level(self, level: int, span: slice) -> DenseLevel:
        batch, height, width = shape = self.batch_size, *self.pyramid.sizes[level]
        found = self.found
        here = np.flatnonzero(found.cells[:, 1] == level)
        image, _, row, column = found.cells[here].T
        cls = np.full(shape, self.unassigned, np.int64)
        cls[image, row, column] = found.labels[here]
        reg = np.zeros((batch, 4, height, width), np.float32)
        reg[image, :, row, column] = found.ltrb[here]
        centerness = np.zeros(shape, np.float32)
        centerness[image, row, column] = found.centerness[here]
        return DenseLevel(
            cls=cls,
            reg=reg,
            centerness=centerness,
            ignored=None if self.ignored is None else self.ignored[:, span].reshape(shape),
        )

    def _level_spans(self) -> Iterator[slice]:
        starts = self.pyramid.starts.tolist()
        return map(slice, starts[:-1], starts[1:])

    def _ignored_cells(self) -> NDArray[np.int32]:
        if self.ignored is None:
            return _NO_CELLS
        image, location = np.nonzero(self.ignored)
        return np.stack([image, *self.pyramid.cells_of(location)], axis=1).astype(np.int32)
