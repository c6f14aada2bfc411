"""The focal loss of many grids of logits, value and gradient, in one launch."""

import triton
import triton.language as tl

from lossd_server.losses.gpu.programs.arithmetic import focal_terms, minus
from lossd_server.losses.gpu.programs.totals import is_last, sum_of
from lossd_server.losses.gpu.programs.words import float64_of

HEADER = tl.constexpr(4)
"""Words before the first tile of each grid: gamma, the negative weight, the positive weight, nothing."""
MOST_GRIDS = tl.constexpr(32)
"""Grids of a launch; a table has room for so many."""
FIELDS = tl.constexpr(31)
"""Words of the table for a grid.

Addresses: 0 logits, 1 gradient, 2 labels, 3 ignored, 4 rows; 0 where there is none. 5 the scale. Sizes: 6
classes, 7 cells. Strides of images, classes and cells: 8 of the logits, 11 of the gradient. Strides of
images and cells: 14 of the labels, 16 of ignored, 18 of the rows. Then 20 whether labels are int64,
21 whether there is background, 22 whether lines of numbers begin and end on 16 bytes, 23 classes of a
tile, 24 blocks of cells, 25 parts of classes, 26 its tiles, 27 how many of them are done: 0. Places of 28 its
loss and 29 its mean, and 30 what that is divided by.
"""

_NONE = tl.constexpr(-200.0)
"""A logit whose loss and gradient are exactly 0 for gamma 2: its share of a class is below e^-87."""


@triton.jit
def focal_program(
    table,
    totals,
    sums,
    LOGITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SQUARE: tl.constexpr,
    CELLS_INNER: tl.constexpr,
    CELLS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Computes a tile: some cells of one image with all their classes or some.

    Whichever program is the last of a grid adds up its losses.

    Args:
        table: The header, the first tile of each grid, and the grids' fields; see `FIELDS`.
        totals: The losses of grids, float64, and their means, float32 in as much room, each at its place.
        sums: The loss of each tile, float64.
        LOGITS: Type of the logits.
        GRADIENT: Type of the gradients; None if there are none.
        SQUARE: Whether gamma is 2; if not, it is read.
        CELLS_INNER: Whether cells are nearer to each other in memory than classes.
        CELLS: Cells of a tile.
        CLASSES: Classes that are computed at a time.
    """
    tile = tl.program_id(0)
    firsts = tl.load(table + HEADER + tl.arange(0, MOST_GRIDS))
    number = tl.sum((firsts <= tile).to(tl.int32), axis=0) - 1
    grid = table + HEADER + MOST_GRIDS + number * FIELDS
    first_tile = tl.load(table + HEADER + number)
    place = (tile - first_tile).to(tl.int32)
    blocks = tl.load(grid + 24).to(tl.int32)
    parts = tl.load(grid + 25).to(tl.int32)
    image = (place // (blocks * parts)).to(tl.int64)
    part = place // blocks % parts
    cell = place % blocks * CELLS + tl.arange(0, CELLS)
    classes = tl.load(grid + 6).to(tl.int32)
    cells = tl.load(grid + 7).to(tl.int32)
    width = tl.load(grid + 23).to(tl.int32)
    label = _labels(grid, image, cell, cells)
    first = part * width
    last = tl.minimum(first + width, classes)
    if tl.load(grid + 22) != 0:
        loss = _losses(
            table, grid, image, cell, cells, label, first, last,
            LOGITS, GRADIENT, SQUARE, CELLS_INNER, CELLS, CLASSES, ALIGNED=True,
        )  # fmt: skip
    else:
        loss = _losses(
            table, grid, image, cell, cells, label, first, last,
            LOGITS, GRADIENT, SQUARE, CELLS_INNER, CELLS, CLASSES, ALIGNED=False,
        )  # fmt: skip
    rows = tl.load(grid + 4)
    if rows != 0:
        to = rows.to(tl.pointer_type(tl.float32)) + image * tl.load(grid + 18) + cell * tl.load(grid + 19)
        tl.store(to, loss, mask=cell < cells)
    tl.store(sums + tile, tl.sum(loss.to(tl.float64), axis=0))
    count = tl.load(grid + 26)
    if is_last(grid + 27, count):
        total = sum_of(sums + first_tile, count)
        tl.store(totals + tl.load(grid + 28), total)
        mean = (totals + tl.load(grid + 29)).to(tl.pointer_type(tl.float32))
        tl.store(mean, (total / float64_of(tl.load(grid + 30))).to(tl.float32))


@triton.jit
def _labels(grid, image, cell, cells):
    """The cells' labels: a class, -1 where all classes are negatives, -2 where a cell takes no part."""
    address = tl.load(grid + 2)
    at = image * tl.load(grid + 14) + cell * tl.load(grid + 15)
    inside = cell < cells
    if tl.load(grid + 20) != 0:
        label = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=-1).to(tl.int32)
    else:
        label = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=-1)
    background = inside & (tl.load(grid + 21) != 0)
    address = tl.load(grid + 3)
    if address != 0:
        at = image * tl.load(grid + 16) + cell * tl.load(grid + 17)
        ignored = tl.load(address.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=1)
        background = background & (ignored == 0)
    return tl.where(label >= 0, label, tl.where(background, -1, -2))


@triton.jit
def _multiple(number, OF: tl.constexpr):
    """The number, which is a multiple already: said so that the compiler knows."""
    return number // OF * OF


@triton.jit
def _cells_of(grid, field, image, cell, TYPE: tl.constexpr, CELLS_INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the numbers of class 0 lie, and how far apart classes are.

    Where numbers are side by side, the compiler is told so, and where 16 bytes begin: it reads as many.
    """
    multiple: tl.constexpr = 128 // TYPE.primitive_bitwidth if ALIGNED else 1
    start = image * _multiple(tl.load(grid + 8 + 3 * field), multiple)
    class_stride = _multiple(tl.load(grid + 9 + 3 * field), multiple)
    cell_stride = _multiple(tl.load(grid + 10 + 3 * field), multiple)
    if ALIGNED and CELLS_INNER:
        cell_stride = 1
    elif ALIGNED:
        class_stride = 1
    base = tl.load(grid + field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + start + cell * cell_stride, class_stride


@triton.jit
def _losses(
    table, grid, image, cell, cells, label, first, last,
    LOGITS: tl.constexpr, GRADIENT: tl.constexpr, SQUARE: tl.constexpr, CELLS_INNER: tl.constexpr,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The cells' losses of classes `first` to `last`; gradients are written."""
    multiple: tl.constexpr = 128 // LOGITS.primitive_bitwidth if ALIGNED else 1
    takes_part = tl.max(label, axis=0) > -2
    cells = _multiple(cells, multiple if CELLS_INNER else 1)
    last = _multiple(last, 1 if CELLS_INNER else multiple)
    first = _multiple(first, CLASSES)
    cell = cell.to(tl.int64)
    if CELLS_INNER:
        number = 0  # one class at a time: what lies beside a cell is the next cell
        total = tl.zeros((CELLS,), tl.float32)
    else:
        cell, label = cell[:, None], label[:, None]
        number = tl.arange(0, CLASSES)[None, :]
        total = tl.zeros((CELLS, CLASSES), tl.float32)
    logits, class_stride = _cells_of(grid, 0, image, cell, LOGITS, CELLS_INNER, ALIGNED)
    logits += number * class_stride
    # Logits are asked for a step before they are wanted: memory takes as long as that.
    inside = (cell < cells) & (first + number < last)
    coming = tl.load(logits + first * class_stride, mask=inside, other=_NONE)
    gamma = float64_of(tl.load(table))
    other_weight, own_weight = float64_of(tl.load(table + 1)), float64_of(tl.load(table + 2))
    if GRADIENT is not None:
        gradient, step = _cells_of(grid, 1, image, cell, GRADIENT, CELLS_INNER, ALIGNED)
        gradient += number * step
        scale = float64_of(tl.load(grid + 5))
        by, by_own = (other_weight * scale).to(tl.float32), (-own_weight * scale).to(tl.float32)
    other_weight, own_weight = other_weight.to(tl.float32), own_weight.to(tl.float32)
    if takes_part:
        for c in range(first, last, CLASSES):
            # What a cell that takes no part holds may be NaN, and must not matter.
            z = tl.where(label > -2, coming.to(tl.float32), _NONE)
            then = c + CLASSES
            inside = (cell < cells) & (then + number < last)
            coming = tl.load(logits + then * class_stride, mask=inside, other=_NONE)
            # A positive's loss of x is a negative's of -x.
            is_own = label == c + number
            loss, slope = focal_terms(tl.where(is_own, minus(z), z), gamma, SQUARE)
            inside = (cell < cells) & (c + number < last)
            if not SQUARE:
                counts = (label > -2) & inside
                loss, slope = tl.where(counts, loss, 0.0), tl.where(counts, slope, 0.0)
            total = tl.fma(loss, tl.where(is_own, own_weight, other_weight), total)
            if GRADIENT is not None:
                value = slope * tl.where(is_own, by_own, by)
                tl.store(gradient + c * step, value.to(GRADIENT), mask=inside)
    elif GRADIENT is not None:
        for c in range(first, last, CLASSES):
            inside = (cell < cells) & (c + number < last)
            tl.store(gradient + c * step, tl.zeros(total.shape, GRADIENT), mask=inside)
    if not CELLS_INNER:
        total = tl.sum(total, axis=1)
    return total
