"""The positive locations that boxes of one type came to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd_server.errors import InvalidInputError, Reason
from lossd_server.targets.pyramid import Pyramid

MAX_PAIRS = 2**28
"""Most pairs of box and location that one assignment looks at."""

Ints = NDArray[np.int64]


class Positives(NamedTuple):
    """P positive locations, in the order of images and locations.

    Attributes:
        labels: Class of each, `[P]`.
        cells: Image, level, row and column of each, `[P, 4]` int32.
        matched: Index of its box among the boxes of its image, `[P]` int32.
        ltrb: Its distances in pixels, `[P, 4]` float32.
        centerness: `[P]` float32.
        level_counts: How many lie on each level, `[L]`.
    """

    labels: Ints
    cells: NDArray[np.int32]
    matched: NDArray[np.int32]
    ltrb: NDArray[np.float32]
    centerness: NDArray[np.float32]
    level_counts: Ints

    def places(self, levels: Pyramid) -> tuple[Ints, Ints]:
        """Returns the image and the flat location of each, `[P]` both."""
        image, level, row, column = self.cells.astype(np.int64).T
        return image, levels.starts[level] + row * levels.widths[level] + column


def joined(parts: Sequence[Positives]) -> Positives:
    """Returns the positives of boxes of several types, in the order of images and locations."""
    if len(parts) == 1:
        return parts[0]
    order = np.lexsort(np.concatenate([part.cells for part in parts]).T[::-1])
    others = {
        name: np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("labels", "cells", "matched", "ltrb", "centerness")
    }
    counts = np.sum([part.level_counts for part in parts], axis=0)
    return Positives(level_counts=counts, **others)


def require_pairs(count: int) -> None:
    """Raises `MESSAGE_TOO_LARGE` for more pairs of box and location than one assignment looks at."""
    if count > MAX_PAIRS:
        raise InvalidInputError(
            Reason.MESSAGE_TOO_LARGE,
            f"boxes can reach {count} locations, at most {MAX_PAIRS} pairs are looked at",
            field="ground_truth",
            value=count,
            limit=MAX_PAIRS,
        )


def require_positives(count: int, limit: int | None) -> None:
    """Raises `MESSAGE_TOO_LARGE` for more positives than may be answered; None is no limit."""
    if limit is not None and count > limit:
        raise InvalidInputError(
            Reason.MESSAGE_TOO_LARGE,
            f"boxes come to {count} positive locations, at most {limit} are answered",
            field="ground_truth",
            value=count,
            limit=limit,
        )
