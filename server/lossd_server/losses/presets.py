"""Whose numbers the FCOS loss reproduces: one row a framework."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd_server.losses.formulas import RowFormula

Floats = NDArray[np.float64]


class LossPreset(StrEnum):
    """The numbers that can be reproduced."""

    AUTOTIMM = "autotimm"
    """AutoTimm's published source."""
    DOCUMENTED = "documented"
    """AutoTimm's documentation."""


class Divisors(NamedTuple):
    """What each term's sums over levels are divided by, `[L]` each."""

    cls: Floats
    reg: Floats
    centerness: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRules:
    """What frameworks disagree about.

    Attributes:
        background: Whether a location without an object counts as a negative of every class; if
            not, it takes no part.
        box_formula: Loss of each positive from predicted and target distances.
        divisors: From each level's valid and positive counts and from the normalizer.
        weighted_components: Whether components are reported after their weights.
    """

    background: bool
    box_formula: RowFormula
    divisors: Callable[[Floats, Floats, float], Divisors]
    weighted_components: bool


def _level_means(valid: Floats, positive: Floats, normalizer: float) -> Divisors:
    """The published source: classification is a mean over each level, centerness is divided twice."""
    return Divisors(
        cls=np.maximum(valid, 1),
        reg=np.full_like(valid, normalizer),
        centerness=np.maximum(positive, 1) * normalizer,
    )


def _normalizer_throughout(valid: Floats, _positive: Floats, normalizer: float) -> Divisors:
    throughout = np.full_like(valid, normalizer)
    return Divisors(cls=throughout, reg=throughout, centerness=throughout)


LOSS_RULES = {
    LossPreset.AUTOTIMM: LossRules(
        background=False,
        box_formula=RowFormula.LOG_IOU_OF_LTRB,
        divisors=_level_means,
        weighted_components=True,
    ),
    LossPreset.DOCUMENTED: LossRules(
        background=True,
        box_formula=RowFormula.GIOU_OF_LTRB,
        divisors=_normalizer_throughout,
        weighted_components=False,
    ),
}
