"""How the losses of rows, weighted where weights are given, become one loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossd_server.checks import host_array
from lossd_server.losses.evaluation import Numbers, as_tensor, to_float64
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.reduction import Reduction
from lossd_server.losses.row_group import RowGroup
from lossd_server.losses.row_kernel import row_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """Rows made into a loss.

    Attributes:
        loss: 0-d, or `[N]` under the reduction `none`.
        total: Weighted sum of the rows' losses, `[1]`.
        extra: What else the formula tells, weighted, summed and divided likewise.
    """

    loss: Tensor
    total: Numbers
    extra: float | Tensor


def total_weight(weights: Any, count: int) -> float:
    """Returns the sum of the weights of rows, numpy or torch; their number where there are none."""
    return float(count) if weights is None else float(host_array(weights).sum(dtype=np.float64))


def reduce_rows(
    formula: RowFormula,
    preds: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    reduction: Reduction,
    divisor: float,
    gradient: Tensor | None,
    floor: float = 1e-7,
) -> Reduced:
    """Evaluates and reduces all rows of a prediction.

    Args:
        formula: What is computed.
        preds: `[K, N]`, any strides.
        targets: `[N, K]`, any float type.
        weights: `[N]`, or None.
        reduction: How.
        divisor: What the sum is divided by; 1 unless the reduction is a mean.
        gradient: Like `preds`, to be written; None if not wanted.
        floor: See `row_sums`.
    """
    dtype = torch.promote_types(preds.dtype, torch.float32)
    count = len(targets)
    # Like the published source, no rows at all give a scalar under every reduction.
    one_by_one = reduction is Reduction.NONE and count > 0
    rows = torch.empty(count, dtype=torch.float64, device=preds.device) if one_by_one else None
    group = RowGroup(
        preds=preds.unsqueeze(0),
        targets=targets.contiguous(),
        factors=None if weights is None else to_float64(weights),
        gradient=None if gradient is None else gradient.unsqueeze(0),
        scale=1 / divisor,
        rows=rows,
    )
    losses, extras = row_sums([group], formula, floor)
    return Reduced(
        loss=as_tensor(losses[0] / divisor, preds, dtype) if rows is None else rows.to(dtype),
        total=losses,
        extra=extras[0] / divisor,
    )
