"""Losses of single rows, boxes or centerness logits, of many groups in one launch."""

import triton
import triton.language as tl

from lossd_server.losses.gpu.programs.boxes import centerness_terms, entropy, giou_terms, log_iou_terms
from lossd_server.losses.gpu.programs.totals import is_last, sum_of
from lossd_server.losses.gpu.programs.words import float64_of

MOST_GROUPS = tl.constexpr(32)
"""Groups of a launch; a table has room for so many."""
FIELDS = tl.constexpr(22)
"""Words of the table for a group.

Addresses: 0 predictions, 1 gradient, 2 targets, 3 images, 4 cells, 5 factors, 6 losses of rows; 0 where
there is none. 7 the number of rows. Strides of images, numbers and cells: 8 of the predictions, 11 of the
gradient. Then 14 the scale, 15 the floor, 16 the formula, 17 whether targets are float64, 18 the programs of
the group, 19 how many of them are done: 0, and the places of 20 its loss and 21 its extra.
"""

GIOU = tl.constexpr(0)
GIOU_OF_LTRB = tl.constexpr(1)
LOG_IOU_OF_LTRB = tl.constexpr(2)
CENTERNESS = tl.constexpr(3)


@triton.jit
def rows_program(table, totals, sums, TYPE: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr):
    """Computes some rows of a group and their gradients; the last of a group adds up losses and extras.

    Args:
        table: The first program of each group, and the groups' fields; see `FIELDS`.
        totals: The losses and extras of groups, float64, each at its place.
        sums: The loss of each program, then the extra of each, float64.
        TYPE: Type of the predictions.
        GRADIENT: Type of the gradients; None if there are none.
        ROWS: Rows of a program.
    """
    program = tl.program_id(0)
    firsts = tl.load(table + tl.arange(0, MOST_GROUPS))
    number = tl.sum((firsts <= program).to(tl.int32), axis=0) - 1
    group = table + MOST_GROUPS + number * FIELDS
    first_program = tl.load(table + number)
    row = (program - first_program) * ROWS + tl.arange(0, ROWS)
    here = row < tl.load(group + 7)
    image, cell = _places(group, row, here)
    factor = tl.full((ROWS,), 1.0, tl.float64)
    address = tl.load(group + 5)
    if address != 0:
        factor = tl.load(address.to(tl.pointer_type(tl.float64)) + row, mask=here, other=0.0)
    if tl.load(group + 16) == CENTERNESS:
        loss, extra = _logits(group, row, here, image, cell, factor, TYPE, GRADIENT)
    else:
        loss, extra = _boxes(group, row, here, image, cell, factor, TYPE, GRADIENT)
    loss = tl.where(here, loss * factor, 0.0)
    address = tl.load(group + 6)
    if address != 0:
        tl.store(address.to(tl.pointer_type(tl.float64)) + row, loss, mask=here)
    extras = sums + tl.num_programs(0)
    tl.store(sums + program, tl.sum(loss, axis=0))
    tl.store(extras + program, tl.sum(tl.where(here, extra * factor, 0.0), axis=0))
    count = tl.load(group + 18)
    if is_last(group + 19, count):
        tl.store(totals + tl.load(group + 20), sum_of(sums + first_program, count))
        tl.store(totals + tl.load(group + 21), sum_of(extras + first_program, count))


@triton.jit
def _places(group, row, here):
    """The image and the cell of each row: row i is cell i of one image where nothing else is said."""
    image = tl.zeros_like(row)
    cell = row
    address = tl.load(group + 4)
    if address != 0:
        cell = tl.load(address.to(tl.pointer_type(tl.int64)) + row, mask=here, other=0)
        image = tl.load(tl.load(group + 3).to(tl.pointer_type(tl.int64)) + row, mask=here, other=0)
    return image, cell


@triton.jit
def _targets(group, at, here):
    address = tl.load(group + 2)
    if tl.load(group + 17) != 0:
        target = tl.load(address.to(tl.pointer_type(tl.float64)) + at, mask=here, other=1.0)
    else:
        target = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=here, other=1.0).to(tl.float64)
    return target


@triton.jit
def _logits(group, row, here, image, cell, factor, TYPE: tl.constexpr, GRADIENT: tl.constexpr):
    """The centerness loss of rows, and the entropy of their targets."""
    pred = tl.load(group).to(tl.pointer_type(TYPE)) + image * tl.load(group + 8) + cell * tl.load(group + 10)
    target = _targets(group, row, here)
    loss, slope = centerness_terms(tl.load(pred, mask=here, other=0.0).to(tl.float64), target)
    if GRADIENT is not None:
        _put(group, 0, here, image, cell, slope * factor, GRADIENT)
    return loss, entropy(target)


@triton.jit
def _boxes(group, row, here, image, cell, factor, TYPE: tl.constexpr, GRADIENT: tl.constexpr):
    """The box loss of rows, and whether a predicted distance is negative."""
    pred = tl.load(group).to(tl.pointer_type(TYPE)) + image * tl.load(group + 8) + cell * tl.load(group + 10)
    step = tl.load(group + 9)
    formula = tl.load(group + 16)
    floor = float64_of(tl.load(group + 15))
    # A box from corner to corner is one of distances from the origin, two of them turned round.
    sign = tl.where(formula == GIOU, -1.0, 1.0).to(tl.float64)
    l = tl.load(pred, mask=here, other=1.0).to(tl.float64) * sign
    t = tl.load(pred + step, mask=here, other=1.0).to(tl.float64) * sign
    r = tl.load(pred + 2 * step, mask=here, other=1.0).to(tl.float64)
    b = tl.load(pred + 3 * step, mask=here, other=1.0).to(tl.float64)
    left = _targets(group, row * 4, here) * sign
    top = _targets(group, row * 4 + 1, here) * sign
    right = _targets(group, row * 4 + 2, here)
    bottom = _targets(group, row * 4 + 3, here)
    if formula == LOG_IOU_OF_LTRB:
        loss, by_l, by_t, by_r, by_b = log_iou_terms(l, t, r, b, left, top, right, bottom, floor)
    else:
        loss, by_l, by_t, by_r, by_b = giou_terms(l, t, r, b, left, top, right, bottom, floor)
    if GRADIENT is not None:
        _put(group, 0, here, image, cell, by_l * sign * factor, GRADIENT)
        _put(group, 1, here, image, cell, by_t * sign * factor, GRADIENT)
        _put(group, 2, here, image, cell, by_r * factor, GRADIENT)
        _put(group, 3, here, image, cell, by_b * factor, GRADIENT)
    negative = (l < 0) | (t < 0) | (r < 0) | (b < 0)
    return loss, (negative & (formula != GIOU)).to(tl.float64)


@triton.jit
def _put(group, number, here, image, cell, value, GRADIENT: tl.constexpr):
    """Writes one number of each row's gradient, rounded by way of float32, as torch does."""
    to = tl.load(group + 1).to(tl.pointer_type(GRADIENT))
    to += image * tl.load(group + 11) + number * tl.load(group + 12) + cell * tl.load(group + 13)
    tl.store(to, (value * float64_of(tl.load(group + 14))).to(tl.float32).to(GRADIENT), mask=here)
