"""All terms of an FCOS head: one launch for all logits, one for the positives, one for the sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, grid
from lossd_server.losses.gpu.focal import applies, focal_launches
from lossd_server.losses.gpu.launch import FREE, Launch, Words, address_of, run, scale_words
from lossd_server.losses.gpu.library import loaded_programs

MOST_LEVELS = 16
"""As in programs/positives.py."""

_COLUMNS = 6
_ROWS = 128

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Scales = Tensor | Sequence[float]
"""One number a level; a tensor is `[L]` float64 on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositiveTerms:
    """What is computed at the positives of a head, and where the gradients go.

    Attributes:
        reg_preds: Distances l, t, r, b, one map a level, `[B, 4, H, W]`, any strides.
        centerness_preds: Centerness logits, one map a level, `[B, 1, H, W]`, any strides.
        starts: Where each level begins in the flat row of locations; the last entry is its length.
        image: Image of each positive, `[P]` int64.
        location: Place of each positive in the flat row, `[P]` int64.
        ltrb: Target distances of each positive, `[P, 4]`, any float type but float64.
        centerness: Target centerness of each positive, `[P]`, likewise.
        giou: Whether the box term is `1 - GIoU`; if not, `-log IoU`.
        reg_gradients: Zeros like `reg_preds`, written at the positives; None if not wanted.
        centerness_gradients: Zeros like `centerness_preds`, likewise.
        reg_scales: What the derivative of each level's box term is multiplied by.
        centerness_scales: The same of the centerness term.
    """

    reg_preds: Sequence[Tensor]
    centerness_preds: Sequence[Tensor]
    starts: Sequence[int]
    image: Tensor
    location: Tensor
    ltrb: Tensor
    centerness: Tensor
    giou: bool
    reg_gradients: Sequence[Tensor] | None = None
    centerness_gradients: Sequence[Tensor] | None = None
    reg_scales: Scales | None = None
    centerness_scales: Scales | None = None

    def gradients(self) -> list[Tensor]:
        """Returns all maps of gradients."""
        return [*(self.reg_gradients or ()), *(self.centerness_gradients or ())]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSums:
    """Sums over each level, `[L]` float64 each.

    Attributes:
        cls: Of the focal loss.
        reg: Of the box loss.
        centerness: Of the centerness loss.
        centerness_floor: Of the entropy of the centerness targets.
        centerness_target: Of the centerness targets.
        positive_count: Positives.
        negative_side_count: Positives of which a predicted distance is negative.
    """

    cls: Tensor
    reg: Tensor
    centerness: Tensor
    centerness_floor: Tensor
    centerness_target: Tensor
    positive_count: Tensor
    negative_side_count: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PositivesVariant:
    """What the program of the positives is compiled for.

    Attributes:
        preds: Type of the predictions.
        gradient: Type of the gradients, that of the predictions or float32.
        giou: Whether the box term is `1 - GIoU`.
    """

    preds: torch.dtype
    gradient: torch.dtype
    giou: bool


POSITIVES_VARIANTS = frozenset(
    PositivesVariant(preds=preds, gradient=gradient, giou=giou)
    for preds in _DTYPES
    for gradient in {preds, torch.float32}
    for giou in (True, False)
)
"""All there are, as `FOCAL_VARIANTS`."""


def head_sums_on_gpu(
    grids: Sequence[FocalGrid], constants: FocalConstants, terms: PositiveTerms
) -> HeadSums | None:
    """Computes the three terms of a head, and writes their gradients; None where that does not apply.

    Args:
        grids: Logits and labels, one grid a level, as for `focal_sums`.
        constants: The constants of the focal loss.
        terms: The positives.
    """
    programs = loaded_programs()
    if programs is None or not _applies(terms) or not all(applies(level, constants) for level in grids):
        return None
    launches, order = focal_launches(grids, constants, programs)
    totals = run([*launches, _launch(terms, programs)], terms.image.device, programs)
    cls = totals[: len(grids)]
    columns = totals[len(grids) :].reshape(_COLUMNS, len(terms.reg_preds))
    return HeadSums(
        cls=cls if order == sorted(order) else cls[np.argsort(order)],
        reg=columns[0],
        centerness=columns[1],
        centerness_floor=columns[2],
        centerness_target=columns[3],
        positive_count=columns[4],
        negative_side_count=columns[5],
    )


def _applies(terms: PositiveTerms) -> bool:
    dtypes = {pred.dtype for pred in (*terms.reg_preds, *terms.centerness_preds)}
    return (
        len(terms.reg_preds) <= MOST_LEVELS
        and len(dtypes) == 1
        and len({gradient.dtype for gradient in terms.gradients()}) <= 1
        and variant_of(terms) in POSITIVES_VARIANTS
        and torch.float64 not in {terms.ltrb.dtype, terms.centerness.dtype}
    )


def variant_of(terms: PositiveTerms) -> PositivesVariant:
    """Returns what the program has to be compiled for."""
    dtype = terms.reg_preds[0].dtype
    gradients = [gradient.dtype for gradient in terms.gradients()]
    return PositivesVariant(preds=dtype, gradient=gradients[0] if gradients else dtype, giou=terms.giou)


def _launch(terms: PositiveTerms, programs: ModuleType) -> Launch:
    levels, positives = len(terms.reg_preds), len(terms.image)
    program_count = -(-positives // _ROWS)
    variant = variant_of(terms)
    targets = [terms.image.contiguous(), terms.location.contiguous()]
    targets += [terms.ltrb.float().contiguous(), terms.centerness.float().contiguous()]
    header = [positives, *map(address_of, targets), levels, 0, 0]
    firsts = [*terms.starts[:levels], *[FREE] * (MOST_LEVELS - levels)]
    fields = [_fields(terms, level) for level in range(levels)]
    return Launch(
        program="positives_program",
        words=np.concatenate([np.array([*header, *firsts], np.int64), *fields]),
        program_count=program_count,
        spans=[(i * program_count, (i + 1) * program_count) for i in range(_COLUMNS * levels)],
        constants={
            "TYPE": programs.TYPES[variant.preds],
            "GRADIENT": programs.TYPES[variant.gradient],
            "GIOU": variant.giou,
            "ROWS": _ROWS,
        },
        tensors=targets,
    )


def _fields(terms: PositiveTerms, level: int) -> Words:
    """Returns the level's words; the program knows them by their places."""
    reg, centerness = grid(terms.reg_preds[level]), grid(terms.centerness_preds[level])
    reg_gradient = _of_level(terms.reg_gradients, level)
    centerness_gradient = _of_level(terms.centerness_gradients, level)
    maps = (reg, centerness, reg_gradient, centerness_gradient)
    return np.array(
        [
            *map(address_of, maps),
            *reg.stride(),
            *centerness.stride()[::2],
            *(reg if reg_gradient is None else reg_gradient).stride(),
            *(centerness if centerness_gradient is None else centerness_gradient).stride()[::2],
            *scale_words(_of_scales(terms.reg_scales, level)),
            *scale_words(_of_scales(terms.centerness_scales, level)),
        ],
        np.int64,
    )


def _of_level(maps: Sequence[Tensor] | None, level: int) -> Tensor | None:
    return None if maps is None else grid(maps[level])


def _of_scales(scales: Scales | None, level: int) -> Tensor | float | None:
    return None if scales is None else scales[level]
