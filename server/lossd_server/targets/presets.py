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


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignerRules:
    """What frameworks disagree about.

    Attributes:
        offset: Where a location lies in its cell, in strides.
        in_range: Of the farthest side m, lower and upper end of the level's range: is the location
            on this level.
        size_key: Of widths and heights: what decides between boxes, smallest first, then first box.
        unassigned: The label of a location that took no box.
        least_extent: Divisor floor of the centerness target.
    """

    offset: float
    in_range: Callable[[Floats, Floats, Floats], NDArray[np.bool_]]
    size_key: Callable[[Floats, Floats], Floats]
    unassigned: int
    least_extent: float


ASSIGNER_RULES = {
    AssignerPreset.AUTOTIMM: AssignerRules(
        offset=0.5,
        in_range=lambda m, lower, upper: (lower <= m) & (m < upper),
        size_key=lambda width, height: width * height,
        unassigned=-1,
        least_extent=1e-7,
    ),
}
