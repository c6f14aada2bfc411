"""The positive locations that boxes of one type came to."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lossd_server.errors import InvalidInputError, Reason

MAX_PAIRS = 2**28
"""Most pairs of box and location that one assignment looks at."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Positives:
    """P positive locations, in the order of images and locations.

    Attributes:
        image: Image of each, `[P]`.
        location: Flat location of each in its image, `[P]`.
        box: Its box among those that were painted, `[P]`.
        ltrb: Its distances in pixels, `[P, 4]` float32.
        centerness: `[P]` float32.
    """

    image: Ints
    location: Ints
    box: Ints
    ltrb: NDArray[np.float32]
    centerness: NDArray[np.float32]


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
