"""How the sums of an FCOS head become its loss: what each is divided by, and what it weighs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.evaluation import EvaluationOptions, Numbers
from lossd_server.losses.fcos_arguments import COMPONENTS
from lossd_server.losses.locations import LevelTargets
from lossd_server.losses.presets import LOSS_RULES, Divisors, LossPreset, LossRules

Floats = NDArray[np.float64]


class HeadReduction(NamedTuple):
    """The numbers that decide it, and none of the predictions.

    Attributes:
        rules: Of the preset.
        weights: Of classification, box regression and centerness.
        levels: What the predictions of each of L levels should be.
        valid: Locations that take part in classification, `[L]`.
        positives: Locations with an object, `[L]`.
        divisors: What the sums of each kind are divided by.
    """

    rules: LossRules
    weights: Sequence[float]
    levels: Sequence[LevelTargets]
    valid: Floats
    positives: Floats
    divisors: Divisors

    @classmethod
    def of(
        cls,
        levels: Sequence[LevelTargets],
        preset: LossPreset,
        weights: Sequence[float],
        normalizer: float | None,
    ) -> "HeadReduction":
        """Returns the reduction under a preset.

        Args:
            levels: As above.
            preset: Whose numbers these are.
            weights: As above.
            normalizer: In place of the number of positives.
        """
        rules = LOSS_RULES[preset]
        positives = valid = np.array([float(targets.positive_count) for targets in levels])
        if rules.background:
            valid = np.array([float(targets.location_count) for targets in levels])
        divisors = rules.divisors(
            valid, positives, max(positives.sum(), 1.0) if normalizer is None else normalizer
        )
        return cls(rules, weights, levels, valid, positives, divisors)

    def scales(self, options: EvaluationOptions) -> list[Floats]:
        """Returns what the gradients of each kind of prediction are multiplied by, `[L]` each."""
        # A component's gradient leaves the weight out where the component itself does.
        bare = options.component_gradients and not self.rules.weighted_components
        weights = (1.0, 1.0, 1.0) if bare else self.weights
        return [weight / divisor for weight, divisor in zip(weights, self.divisors, strict=True)]

    def values(self, sums: Numbers) -> Numbers:
        """Returns the five sums of `TermSums.numbers`, each over its divisors and added up over levels."""
        divisors = np.array([*self.divisors, np.ones_like(self.valid), self.divisors.centerness])
        if isinstance(sums, Tensor):
            return (sums / torch.from_numpy(divisors).to(sums.device, non_blocking=True)).sum(dim=1)
        found: Floats = (sums / divisors).sum(axis=1)
        return found

    def components(self, values: Numbers) -> list[tuple[str, float | Tensor, float]]:
        """Returns the name, value and weight of each component, given `values`."""
        weights = (*self.weights, self.weights[2])
        found = [*values[:3], values[4]]
        if self.rules.weighted_components:
            found = [value * weight for value, weight in zip(found, weights, strict=True)]
            weights = (1.0, 1.0, 1.0, 1.0)
        names, shares = (*COMPONENTS, "centerness_floor"), (*weights[:3], 0.0)
        return list(zip(names, found, shares, strict=True))

    def raw_sums(self, sums: Numbers) -> dict[str, Numbers]:
        """Returns the sums of the three terms, and what else is reported of each level, by name."""
        return {
            **dict(zip(COMPONENTS, sums[:3], strict=True)),
            "centerness_target": np.array([_sum_of(targets.centerness) for targets in self.levels]),
            "valid_count": self.valid,
            "positive_count": self.positives,
        }


def _sum_of(numbers: NDArray[Any]) -> float:
    """Returns the sum of numbers; of none, as on a level without an object, without asking numpy."""
    return float(numbers.sum(dtype=np.float64)) if len(numbers) else 0.0
