"""Losses and gradients of single rows: boxes and centerness.

By a compiled kernel where there is one for the case, otherwise by torch.
"""

from collections.abc import Sequence

from torch import Tensor

from lossd_server.losses.evaluation import fixed_order_sum, stacked
from lossd_server.losses.formulas import RowFormula, row_terms
from lossd_server.losses.gpu import row_sums_on_gpu
from lossd_server.losses.native import row_sums_natively
from lossd_server.losses.row_group import FLOOR, RowGroup, RowSums


def row_sums(groups: Sequence[RowGroup[Tensor]], formula: RowFormula, floor: float = FLOOR) -> RowSums:
    """Returns the sums of each group, and writes gradients and rows.

    Args:
        groups: The rows; those of a group lie in different cells.
        formula: What is computed.
        floor: Least area, and least IoU under a logarithm.
    """
    on_gpu = any(group.preds.is_cuda for group in groups)
    compiled = (row_sums_on_gpu if on_gpu else row_sums_natively)(groups, formula, floor)
    if compiled is not None:
        return compiled
    parts = [_sums_by_torch(group, formula, floor) for group in groups]
    losses, extras = zip(*parts, strict=True)
    return RowSums(losses=stacked(losses), extras=stacked(extras))


def _sums_by_torch(group: RowGroup[Tensor], formula: RowFormula, floor: float) -> tuple[Tensor, Tensor]:
    terms = row_terms(formula, _picked(group).double(), group.targets.double(), floor)
    losses, slopes, extras = terms.losses, terms.slopes, terms.extras
    if group.factors is not None:
        losses, extras = losses * group.factors, extras * group.factors
        slopes = slopes * group.factors.unsqueeze(1)
    if group.rows is not None:
        group.rows.copy_(losses)
    if group.gradient is not None:
        _put(group, slopes * group.scale)
    return fixed_order_sum(losses), fixed_order_sum(extras)


def _picked(group: RowGroup[Tensor]) -> Tensor:
    """Returns the predictions of the rows, `[P, K]`."""
    return group.preds[0].t() if group.cells is None else group.preds[group.images, :, group.cells]


def _put(group: RowGroup[Tensor], values: Tensor) -> None:
    gradient = group.gradient
    if gradient is None:
        return
    if group.cells is None:
        gradient[0].t().copy_(values)
    else:
        gradient[group.images, :, group.cells] = values.to(gradient.dtype)
