"""How the losses of rows, weighted where weights are given, become one loss."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.checks import host_array
from lossd_server.losses.arrays import NARROW_FLOATS, PLAIN_GRADIENTS, are_finite, are_plain
from lossd_server.losses.evaluation import (
    EvaluationOptions,
    Numbers,
    Place,
    as_float32,
    as_tensor,
    to_float64,
)
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.native import row_sums_natively
from lossd_server.losses.reduction import Reduction
from lossd_server.losses.row_group import FLOOR, RowGroup
from lossd_server.losses.row_kernel import row_sums

_FLOATS = NARROW_FLOATS | {np.dtype(np.float64)}


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


class ReducedArrays(NamedTuple):
    """Rows in arrays made into one number: as `Reduced`, and the gradients by name."""

    loss: NDArray[np.float32]
    total: float
    extra: float
    gradients: dict[str, list[NDArray[Any]]]


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
    floor: float = FLOOR,
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


def reduce_arrays(
    formula: RowFormula,
    preds: Any,
    targets: Any,
    weights: Any,
    *,
    reduction: Reduction,
    divisor: float,
    options: EvaluationOptions,
    place: Place,
    floor: float = FLOOR,
) -> ReducedArrays | None:
    """Evaluates and reduces all rows by the compiled kernel, to the bits of `reduce_rows`.

    None where tensors have to be made: for other types and layouts, one loss a row, no rows at all, NaN and
    infinity, which are to be told, and a loss beyond float32; and where there is no kernel.

    Args:
        formula: What is computed.
        preds: The prediction, row after row.
        targets: What it should be, likewise; floats, or integers in any order.
        weights: One number a row, likewise, or None.
        reduction: How.
        divisor: See `reduce_rows`.
        options: What is wanted.
        place: See `LossModule.evaluate_arrays`.
        floor: See `row_sums`.
    """
    is_usual = reduction is not Reduction.NONE and options.gradient_dtype in PLAIN_GRADIENTS
    if not (is_usual and are_plain(NARROW_FLOATS, preds) and preds.size):
        return None
    if isinstance(targets, np.ndarray) and targets.dtype.kind in "iu":
        targets = targets.astype(np.float64, order="C")
    others = [targets] if weights is None else [targets, weights]
    if not (are_plain(_FLOATS, *others) and are_finite(preds, *others)):
        return None
    gradients = {name: place(name) for name in options.gradients}
    (gradient,) = next(iter(gradients.values()), [None])
    shape = (-1, formula.numbers)
    group = RowGroup(
        preds=preds.reshape(shape).T[None],
        targets=targets.reshape(shape),
        factors=None if weights is None else weights.astype(np.float64, copy=False),
        gradient=None if gradient is None else gradient.reshape(shape).T[None],
        scale=1 / divisor,
    )
    sums = row_sums_natively([group], formula, floor)
    if sums is None:
        return None
    total, extra = float(sums.losses[0]), float(sums.extras[0])
    loss = as_float32(total / divisor)
    if loss is None:
        return None
    return ReducedArrays(loss=loss, total=total, extra=extra / divisor, gradients=gradients)
