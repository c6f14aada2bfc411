"""What the kernels of row losses work on: rows of a map, what they should be, and where results go."""

from typing import Generic, NamedTuple

from lossd_server.losses.arrays import A
from lossd_server.losses.evaluation import Numbers

FLOOR = 1e-7
"""Least area, and least IoU under a logarithm, unless told otherwise."""


class RowGroup(NamedTuple, Generic[A]):
    """P rows of K numbers each, picked from a map: tensors, or arrays of numpy.

    Attributes:
        preds: The map, `[B, K, S]`, any float type and any strides.
        targets: `[P, K]`, any float type.
        images: Image of each row, `[P]` int64; None, like `cells`, where row i is cell i of one image.
        cells: Cell of each row, `[P]` int64.
        factors: What the loss of each row is multiplied by, `[P]` float64; None for 1.
        gradient: Like `preds`; written, at the cells of the rows alone, with `scale · ∂loss/∂pred`;
            None if not wanted.
        scale: What the gradient is multiplied by.
        rows: `[P]` float64, written with the loss of each row; None if not wanted.
    """

    preds: A
    targets: A
    images: A | None = None
    cells: A | None = None
    factors: A | None = None
    gradient: A | None = None
    scale: float = 1.0
    rows: A | None = None


class RowSums(NamedTuple):
    """Sums over the rows of each group, `[G]` each.

    Attributes:
        losses: Of the losses.
        extras: Of what else the formula tells; see `RowFormula`.
    """

    losses: Numbers
    extras: Numbers
