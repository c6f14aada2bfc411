"""What the focal kernels work on: a grid of logits with its labels, and the constants."""

import math
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from lossd_server.losses.arrays import A
from lossd_server.losses.evaluation import Numbers

_LARGEST_GAMMA = 4
"""Of the compiled kernel, which multiplies."""


class FocalConstants(NamedTuple):
    """The constants of a focal loss; `alpha` None or negative switches the class weights off."""

    alpha: float | None
    gamma: float

    @property
    def has_kernel(self) -> bool:
        """Whether the compiled kernel knows this gamma."""
        return self.gamma in range(_LARGEST_GAMMA + 1)

    @property
    def positive_weight(self) -> float:
        """Weight of a row's own class."""
        return 1.0 if self.alpha is None or self.alpha < 0 else self.alpha

    @property
    def negative_weight(self) -> float:
        """Weight of every other class."""
        return 1.0 if self.alpha is None or self.alpha < 0 else 1 - self.alpha


class FocalGrid(NamedTuple, Generic[A]):
    """Logits, what is at their locations, and where the results go: tensors, or arrays of numpy.

    In one that is `flat`, tensors have the shapes that are given here. In any other, there may be one more
    axis for the locations, `[H, W]` in place of `[S]`, or `[N, C]` logits and `[N]` of the rest.

    Attributes:
        logits: `[B, C, S]`, any float type and any strides.
        labels: `[B, S]`, any integer type, 0..C-1, or negative for a location without an object.
        background: Whether a location without an object is a negative of every class; if not, it
            takes no part.
        ignored: `[B, S]` bool: locations without an object that take no part all the same; None for none.
        gradient: `[B, C, S]`, written with `scale · ∂loss/∂logit`, exact zeros where a location takes
            no part; None if not wanted.
        scale: What the gradient is multiplied by.
        divisor: What the loss is divided by, where a kernel does that.
        rows: `[B, S]`, float64 for float64 logits, otherwise float32: written with the loss of each
            location, summed over classes; None if not wanted.
    """

    logits: A
    labels: A
    background: bool = False
    ignored: A | None = None
    gradient: A | None = None
    scale: float = 1.0
    divisor: float = 1.0
    rows: A | None = None


class FocalSums(NamedTuple):
    """What a kernel found.

    Attributes:
        losses: Summed loss of each grid, `[G]`.
        finite: Whether every logit is; None where nobody looked.
        means: Each loss over its grid's divisor, `[G]` float32; None where no kernel has divided.
    """

    losses: Numbers
    finite: bool | None
    means: Tensor | None = None


def flat(problem: FocalGrid[Tensor]) -> FocalGrid[Tensor]:
    """Returns a grid with the locations of each image in a row, what is written to as a view."""
    logits = grid(problem.logits)
    batch, _, locations = logits.shape
    return problem._replace(
        logits=logits,
        labels=_row_by_row(problem.labels, batch, locations),
        ignored=None if problem.ignored is None else _row_by_row(problem.ignored, batch, locations),
        gradient=None if problem.gradient is None else grid(problem.gradient),
        rows=None if problem.rows is None else problem.rows.view(batch, locations),
    )


def taking_part(problem: FocalGrid[Tensor]) -> Tensor:
    """Returns which locations of a flat grid count, `[B, S]` bool."""
    if not problem.background:
        return problem.labels >= 0
    if problem.ignored is None:
        return torch.ones_like(problem.labels, dtype=torch.bool)
    return ~problem.ignored


def grid(array: A) -> A:
    """Returns `[N, C]` as `[1, C, N]` and `[B, C, H, W]` as `[B, C, H·W]`, a view wherever strides allow.

    What is `[B, C, S]` already stays as it is.
    """
    if array.ndim == 2:
        return array.T[None]
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:]))


def _row_by_row(tensor: Tensor, batch: int, locations: int) -> Tensor:
    in_rows = tensor.reshape(batch, locations)
    return in_rows if in_rows.stride(1) == 1 else in_rows.contiguous()
