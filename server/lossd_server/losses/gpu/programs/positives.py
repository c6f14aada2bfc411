"""The box term and the centerness term of an FCOS head at its positives, in one launch for all levels."""

import triton
import triton.language as tl

from lossd_server.losses.gpu.programs.boxes import centerness_terms, entropy, giou_terms, log_iou_terms
from lossd_server.losses.gpu.programs.words import scale_of

HEADER = tl.constexpr(8)
"""Words before the first location of each level.

The number of positives; addresses of their images, locations, distances and centerness; the number of
levels.
"""
MOST_LEVELS = tl.constexpr(16)
"""Levels of a head; a table has room for so many."""
FIELDS = tl.constexpr(18)
"""Words of the table for a level.

Addresses: 0 distances, 1 centerness logits, 2 and 3 their gradients, 0 where there is none. Strides: 4 of
the distances by image, side and cell, 7 of the centerness logits by image and cell, 9 and 12 of the
gradients likewise. Scale of the distances: 14 its address, 15 its bits; 16 and 17 of the centerness.
"""
COLUMNS = tl.constexpr(6)
"""Sums of a level."""


@triton.jit
def positives_program(
    table, sums, TYPE: tl.constexpr, GRADIENT: tl.constexpr, GIOU: tl.constexpr, ROWS: tl.constexpr
):
    """Computes some of the positives: their gradients, and the sums of each level among them.

    Args:
        table: The header, the first location of each level, and the levels' fields; see `FIELDS`.
        sums: Of each column, level and program, float64.
        TYPE: Type of the predictions.
        GRADIENT: Type of the gradients.
        GIOU: Whether the box term is `1 - GIoU`; if not, `-log IoU`.
        ROWS: Positives of a program.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < tl.load(table)
    image = tl.load(tl.load(table + 1).to(tl.pointer_type(tl.int64)) + row, mask=here, other=0)
    location = tl.load(tl.load(table + 2).to(tl.pointer_type(tl.int64)) + row, mask=here, other=0)
    firsts = tl.load(table + HEADER + tl.arange(0, MOST_LEVELS))
    level = tl.sum((location[:, None] >= firsts[None, :]).to(tl.int32), axis=1) - 1
    fields = table + HEADER + MOST_LEVELS + level * FIELDS
    cell = location - tl.load(table + HEADER + level)
    box_loss, negative_sides = _boxes(table, fields, row, here, image, cell, TYPE, GRADIENT, GIOU)
    target = tl.load(tl.load(table + 4).to(tl.pointer_type(tl.float32)) + row, mask=here, other=0.0)
    target = target.to(tl.float64)
    loss = _centerness(fields, here, image, cell, target, TYPE, GRADIENT)
    levels = tl.load(table + 5).to(tl.int32)
    sums += tl.program_id(0)
    step = tl.num_programs(0)
    for number in range(levels):
        among = here & (level == number)
        to = sums + number * step
        tl.store(to, tl.sum(tl.where(among, box_loss, 0.0), axis=0))
        tl.store(to + levels * step, tl.sum(tl.where(among, loss, 0.0), axis=0))
        tl.store(to + 2 * levels * step, tl.sum(tl.where(among, entropy(target), 0.0), axis=0))
        tl.store(to + 3 * levels * step, tl.sum(tl.where(among, target, 0.0), axis=0))
        tl.store(to + 4 * levels * step, tl.sum(among.to(tl.float64), axis=0))
        tl.store(to + 5 * levels * step, tl.sum((among & negative_sides).to(tl.float64), axis=0))


@triton.jit
def _boxes(
    table, fields, row, here, image, cell, TYPE: tl.constexpr, GRADIENT: tl.constexpr, GIOU: tl.constexpr
):
    """The box loss of rows, and whether a predicted distance is negative; writes the gradients."""
    pred = tl.load(fields).to(tl.pointer_type(TYPE), bitcast=True)
    pred += image * tl.load(fields + 4) + cell * tl.load(fields + 6)
    side = tl.load(fields + 5)
    l = tl.load(pred, mask=here, other=1.0).to(tl.float64)
    t = tl.load(pred + side, mask=here, other=1.0).to(tl.float64)
    r = tl.load(pred + 2 * side, mask=here, other=1.0).to(tl.float64)
    b = tl.load(pred + 3 * side, mask=here, other=1.0).to(tl.float64)
    target = tl.load(table + 3).to(tl.pointer_type(tl.float32)) + row * 4
    left = tl.load(target, mask=here, other=1.0).to(tl.float64)
    top = tl.load(target + 1, mask=here, other=1.0).to(tl.float64)
    right = tl.load(target + 2, mask=here, other=1.0).to(tl.float64)
    bottom = tl.load(target + 3, mask=here, other=1.0).to(tl.float64)
    if GIOU:
        loss, by_l, by_t, by_r, by_b = giou_terms(l, t, r, b, left, top, right, bottom)
    else:
        loss, by_l, by_t, by_r, by_b = log_iou_terms(l, t, r, b, left, top, right, bottom)
    address = tl.load(fields + 2)
    wanted = here & (address != 0)
    scale = scale_of(tl.load(fields + 14), tl.load(fields + 15))
    to = address.to(tl.pointer_type(GRADIENT), bitcast=True)
    to += image * tl.load(fields + 9) + cell * tl.load(fields + 11)
    side = tl.load(fields + 10)
    tl.store(to, _narrow(by_l * scale, GRADIENT), mask=wanted)
    tl.store(to + side, _narrow(by_t * scale, GRADIENT), mask=wanted)
    tl.store(to + 2 * side, _narrow(by_r * scale, GRADIENT), mask=wanted)
    tl.store(to + 3 * side, _narrow(by_b * scale, GRADIENT), mask=wanted)
    return loss, (l < 0) | (t < 0) | (r < 0) | (b < 0)


@triton.jit
def _centerness(fields, here, image, cell, target, TYPE: tl.constexpr, GRADIENT: tl.constexpr):
    """The centerness loss of rows; writes the gradients."""
    pred = tl.load(fields + 1).to(tl.pointer_type(TYPE), bitcast=True)
    pred += image * tl.load(fields + 7) + cell * tl.load(fields + 8)
    loss, slope = centerness_terms(tl.load(pred, mask=here, other=0.0).to(tl.float64), target)
    address = tl.load(fields + 3)
    to = address.to(tl.pointer_type(GRADIENT), bitcast=True)
    to += image * tl.load(fields + 12) + cell * tl.load(fields + 13)
    scale = scale_of(tl.load(fields + 16), tl.load(fields + 17))
    tl.store(to, _narrow(slope * scale, GRADIENT), mask=here & (address != 0))
    return loss


@triton.jit
def _narrow(value, TYPE: tl.constexpr):
    """Rounded by way of float32, as torch does: there is no shorter one on every processor."""
    return value.to(tl.float32).to(TYPE)
