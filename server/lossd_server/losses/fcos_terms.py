"""The three terms of an FCOS loss, each with its sums and its gradients level by level."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, empty_gradient, grid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.formulas import RowFormula, centerness_terms
from lossd_server.losses.locations import LocationTargets, flat_levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One term before weights and division.

    Attributes:
        sums: Sum of its rows over each level, `[L]` float64.
        gradients: Of each level's predictions, in their shape; None if not wanted.
    """

    sums: Tensor
    gradients: list[Tensor] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientRequest:
    """How a term's gradients are wanted.

    Attributes:
        scale: What the derivative of each level's sum is multiplied by, `[L]` float64.
        dtype: Type of the gradients; None means that of the predictions.
    """

    scale: Tensor
    dtype: torch.dtype | None


def classification_term(
    preds: Sequence[Tensor],
    targets: LocationTargets,
    constants: FocalConstants,
    request: GradientRequest | None,
    *,
    background: bool,
) -> Term:
    """Focal loss over the locations that take part, with or without background."""
    gradients = None if request is None else [empty_gradient(pred, request.dtype) for pred in preds]
    grids = [
        FocalGrid(
            logits=grid(pred),
            labels=targets.labels[:, span],
            background=background,
            ignored=None if targets.ignored is None else targets.ignored[:, span],
            gradient=None if gradients is None else grid(gradients[level]),
            scale=None if request is None else request.scale[level],
        )
        for level, (pred, span) in enumerate(zip(preds, targets.spans(), strict=True))
    ]
    return Term(sums=focal_sums(grids, constants), gradients=gradients)


def regression_term(
    ltrb: Tensor,
    preds: Sequence[Tensor],
    targets: LocationTargets,
    formula: RowFormula,
    request: GradientRequest | None,
) -> Term:
    """Box loss over the positives, whose predicted distances are `ltrb` `[P, 4]`."""
    rows, slopes = formula(ltrb.double(), targets.ltrb.double())
    return _term_of_positives(rows, slopes, preds, targets, request)


def centerness_term(
    preds: Sequence[Tensor], targets: LocationTargets, request: GradientRequest | None
) -> Term:
    """Binary cross-entropy over the positives."""
    logits = at_positives(preds, targets).squeeze(1)
    rows, slopes = centerness_terms(logits.double(), targets.centerness.double())
    return _term_of_positives(rows, slopes.unsqueeze(1), preds, targets, request)


def at_positives(maps: Sequence[Tensor], targets: LocationTargets) -> Tensor:
    """Returns the values of maps `[B, K, H, W]` at the positives, `[P, K]`."""
    return flat_levels(maps)[targets.image, :, targets.location]


def _term_of_positives(
    rows: Tensor,
    slopes: Tensor,
    preds: Sequence[Tensor],
    targets: LocationTargets,
    request: GradientRequest | None,
) -> Term:
    gradients = None
    if request is not None:
        scaled = slopes * request.scale[targets.level()].unsqueeze(1)
        gradients = _spread_over_levels(scaled, preds, targets, request.dtype)
    return Term(sums=targets.sum_by_level(rows), gradients=gradients)


def _spread_over_levels(
    values: Tensor, preds: Sequence[Tensor], targets: LocationTargets, dtype: torch.dtype | None
) -> list[Tensor]:
    """Returns maps like `preds` with `values` `[P, K]` at the positives and exact zeros elsewhere."""
    batch, channels = preds[0].shape[:2]
    flat = values.new_zeros(batch, channels, targets.starts[-1])
    flat[targets.image, :, targets.location] = values
    return [
        flat[:, :, span].reshape(pred.shape).to(dtype or pred.dtype)
        for pred, span in zip(preds, targets.spans(), strict=True)
    ]
