"""Whose rules an assigner follows: one row a framework."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


class AssignerPreset(StrEnum):
    """The frameworks whose assignment can be reproduced."""

    AUTOTIMM = "autotimm"
    """AutoTimm's published source."""


def area(width: Floats, height: Floats) -> Floats:
    """Returns the areas of boxes."""
    return width * height


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignerRules:
    """What frameworks disagree about.

    Attributes:
        offset: Where a location lies in its cell, in strides.
        lower_included: Whether a farthest side at the lower end of a level's range is in it.
        upper_included: The same for the upper end.
        size_key: Of widths and heights: what decides between boxes, smallest first, then first box.
        unassigned: The label of a location that took no box.
        least_extent: Divisor floor of the centerness target.
    """

    offset: float
    lower_included: bool
    upper_included: bool
    size_key: Callable[[Floats, Floats], Floats]
    unassigned: int
    least_extent: float

    def in_range(self, farthest: Floats, lower: Floats, upper: Floats) -> NDArray[np.bool_]:
        """Returns whether farthest sides are in the ranges of their levels."""
        above = farthest >= lower if self.lower_included else farthest > lower
        below = farthest <= upper if self.upper_included else farthest < upper
        within: NDArray[np.bool_] = above & below
        return within


ASSIGNER_RULES = {
    AssignerPreset.AUTOTIMM: AssignerRules(
        offset=0.5,
        lower_included=True,
        upper_included=False,
        size_key=area,
        unassigned=-1,
        least_extent=1e-7,
    ),
}
