"""Whose numbers the FCOS loss reproduces: one row a framework."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from lossd_server.losses.formulas import RowFormula, giou_loss_of_ltrb, log_iou_loss_of_ltrb


class LossPreset(StrEnum):
    """The numbers that can be reproduced."""

    AUTOTIMM = "autotimm"
    """AutoTimm's published source."""
    DOCUMENTED = "documented"
    """AutoTimm's documentation."""


class Divisors(NamedTuple):
    """What each term's sums over levels are divided by, `[L]` or 0-d float64."""

    cls: Tensor
    reg: Tensor
    centerness: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRules:
    """What frameworks disagree about.

    Attributes:
        background: Whether a location without an object counts as a negative of every class; if
            not, it takes no part.
        box_terms: Loss of each positive, and its derivative, from predicted and target distances.
        divisors: From each level's valid and positive counts and from the normalizer.
        weighted_components: Whether components are reported after their weights.
    """

    background: bool
    box_terms: RowFormula
    divisors: Callable[[Tensor, Tensor, Tensor], Divisors]
    weighted_components: bool


def _level_means(valid: Tensor, positive: Tensor, normalizer: Tensor) -> Divisors:
    """The published source: classification is a mean over each level, centerness is divided twice."""
    return Divisors(
        cls=valid.clamp(min=1),
        reg=normalizer,
        centerness=positive.clamp(min=1) * normalizer,
    )


def _normalizer_throughout(_valid: Tensor, _positive: Tensor, normalizer: Tensor) -> Divisors:
    return Divisors(cls=normalizer, reg=normalizer, centerness=normalizer)


LOSS_RULES = {
    LossPreset.AUTOTIMM: LossRules(
        background=False,
        box_terms=log_iou_loss_of_ltrb,
        divisors=_level_means,
        weighted_components=True,
    ),
    LossPreset.DOCUMENTED: LossRules(
        background=True,
        box_terms=giou_loss_of_ltrb,
        divisors=_normalizer_throughout,
        weighted_components=False,
    ),
}
