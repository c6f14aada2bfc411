"""Focal loss and its gradient over a grid of logits, in one go.

By the compiled kernel where there is one for the case, otherwise by torch in cache-sized portions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossd_server.losses.formulas import focal_terms
from lossd_server.losses.native import focal_rows_natively

_PORTION = 1 << 17
"""Logits that torch looks at together on a CPU: the half-dozen temporaries stay in the cache."""

_PORTION_OF_GPU = 1 << 24
"""The same on a GPU, where a launch costs more than memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FocalConstants:
    """The constants of a focal loss; `alpha` None or negative switches the class weights off."""

    alpha: float | None
    gamma: float

    @property
    def positive_weight(self) -> float:
        """Weight of a row's own class."""
        return 1.0 if self.alpha is None or self.alpha < 0 else self.alpha

    @property
    def negative_weight(self) -> float:
        """Weight of every other class."""
        return 1.0 if self.alpha is None or self.alpha < 0 else 1 - self.alpha


def focal_rows(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    constants: FocalConstants,
    *,
    gradient: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Returns the class-summed focal loss of each location, and writes its gradient.

    Args:
        logits: `[B, C, S]`, any float type and any strides.
        labels: `[B, S]` int64, 0..C-1, or negative for a location without an object.
        valid: `[B, S]` bool: the locations that take part; the others get exact zeros.
        constants: Alpha and gamma.
        gradient: `[B, C, S]`, written with `scale · ∂loss/∂logit`; None if not wanted.
        scale: 0-d float64; required with `gradient`.

    Returns:
        `[B, S]`, float64 for float64 logits, otherwise float32.
    """
    compiled = focal_rows_natively(
        logits,
        labels,
        valid,
        gamma=constants.gamma,
        weights=(constants.negative_weight, constants.positive_weight),
        gradient=gradient,
        scale=scale,
    )
    if compiled is not None:
        return compiled
    rows = torch.zeros(
        labels.shape,
        dtype=torch.promote_types(logits.dtype, torch.float32),
        device=logits.device,
    )
    if not logits.shape[1]:
        return rows
    portion = _PORTION_OF_GPU if logits.is_cuda else _PORTION
    for images, cells in _portions(logits.shape, portion):
        at = images, slice(None), cells
        loss, slope = _portion(logits[at], labels[images, cells], constants, rows.dtype)
        taking_part = valid[images, cells]
        rows[images, cells] = loss.masked_fill_(~taking_part, 0)
        if gradient is not None and scale is not None:
            slope.mul_(scale).masked_fill_(~taking_part.unsqueeze(1), 0)
            gradient[at] = slope
    return rows


def grid(tensor: Tensor) -> Tensor:
    """Returns `[N, C]` as `[1, C, N]` and `[B, C, H, W]` as `[B, C, H·W]`, a view wherever strides allow."""
    return tensor.t().unsqueeze(0) if tensor.dim() == 2 else tensor.flatten(2)


def empty_gradient(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns an uninitialised tensor in the shape of `tensor`, of which `grid` is a view."""
    if tensor.dim() == 2 and tensor.stride(0) == 1 != tensor.stride(1):  # laid out class by class
        return torch.empty(tensor.shape[::-1], dtype=dtype or tensor.dtype, device=tensor.device).t()
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        tensor.shape,
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _portion(
    logits: Tensor, labels: Tensor, constants: FocalConstants, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns loss `[b, s]` and slope `[b, C, s]`, as if every location took part.

    All logits are taken for negatives; the one of each object's class is put in with its sign
    flipped, since `f(-x)` is the loss of a positive, and its weight set apart.
    """
    own_class = labels.clamp(min=0).unsqueeze(1)
    has_object = (labels >= 0).unsqueeze(1)
    z = logits.to(dtype, copy=True)
    own = z.gather(1, own_class)
    z.scatter_(1, own_class, torch.where(has_object, -own, own))
    loss, slope = focal_terms(z, constants.gamma)
    negative, positive = constants.negative_weight, constants.positive_weight
    own_loss = loss.gather(1, own_class) * torch.where(has_object, positive, negative)
    own_slope = slope.gather(1, own_class) * torch.where(has_object, -positive, negative)
    loss.mul_(negative).scatter_(1, own_class, own_loss)
    slope.mul_(negative).scatter_(1, own_class, own_slope)
    return loss.sum(dim=1), slope


def _portions(shape: Sequence[int], portion: int) -> Iterator[tuple[slice, slice]]:
    """Yields ranges of images and cells that cover a grid: whole images where they are small."""
    images, classes, cells = shape
    cells_at_once = max(portion // max(classes, 1), 1)
    images_at_once = max(cells_at_once // max(cells, 1), 1)
    for image in range(0, images, images_at_once):
        for cell in range(0, cells, cells_at_once):
            yield slice(image, image + images_at_once), slice(cell, cell + cells_at_once)
