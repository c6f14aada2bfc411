"""How the losses of rows become one loss."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses.evaluation import fixed_order_sum


class Reduction(StrEnum):
    """The reductions."""

    NONE = "none"
    """One loss a row."""
    MEAN = "mean"
    """The mean over rows."""
    SUM = "sum"
    """The sum over rows."""

    @classmethod
    def of(cls, value: "Reduction | str") -> "Reduction":
        """Returns the reduction of that name; raises `InvalidInputError` when there is none."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(cls)
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"is {value!r}, want one of {names}",
                field="reduction",
                value=value,
                allowed=names,
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """Rows made into a loss.

    Attributes:
        loss: 0-d float64, or `[N]` under the reduction `none`.
        total: Weighted sum of the rows, 0-d float64.
        weight: Sum of the weights, the number of rows where there are none, 0-d float64.
        row_factors: What each row's slope is multiplied by in the gradient, `[N]` or 0-d float64.
    """

    loss: Tensor
    total: Tensor
    weight: Tensor
    row_factors: Tensor


def reduce_rows(
    rows: Tensor,
    weights: Tensor | None,
    reduction: Reduction,
    *,
    least_weight: float,
    normalizer: float | None,
) -> Reduced:
    """Reduces the losses of rows, weighted where weights are given.

    Args:
        rows: `[N]` float64.
        weights: `[N]`, or None.
        reduction: `mean` is `Σ w·loss / Σ w`.
        least_weight: Floor of `Σ w`.
        normalizer: Divisor in place of `Σ w`; only for `mean`.
    """
    wide = None if weights is None else weights.double()
    weighted = rows if wide is None else rows * wide
    total = fixed_order_sum(weighted)
    weight = rows.new_tensor(len(rows)) if wide is None else fixed_order_sum(wide)
    divisor = torch.ones_like(weight)
    if reduction is Reduction.MEAN:
        divisor = weight.clamp(min=least_weight)
        if normalizer is not None:
            divisor = torch.full_like(weight, normalizer)
    # Like the published source, no rows at all give a scalar under every reduction.
    scalar = reduction is not Reduction.NONE or not len(rows)
    return Reduced(
        loss=total / divisor if scalar else weighted,
        total=total,
        weight=weight,
        row_factors=1 / divisor if wide is None else wide / divisor,
    )
