"""The focal loss of many grids of logits, value and gradient, in one launch."""

import triton
import triton.language as tl

from lossd_server.losses.gpu.programs.arithmetic import focal_terms, minus
from lossd_server.losses.gpu.programs.totals import is_last, sum_of
from lossd_server.losses.gpu.programs.words import float64_of

HEADER = tl.constexpr(4)
"""Words before the first tile of each grid: gamma, the negative weight, the positive weight, all tiles."""
MOST_GRIDS = tl.constexpr(32)
"""Grids of a launch; a table has room for so many."""
FIELDS = tl.constexpr(29)
"""Words of the table for a grid.

Addresses: 0 logits, 1 gradient, 2 labels, 3 ignored, 4 rows; 0 where there is none. 5 the scale. Sizes: 6
classes, 7 cells. Strides of images, classes and cells: 8 of the logits, 11 of the gradient. Strides of
images and cells: 14 of the labels, 16 of ignored, 18 of the rows. Then 20 whether labels are int64,
21 whether there is background, 22 whether lines of numbers begin and end on 16 bytes, 23 classes of a
tile, 24 blocks of cells, 25 parts of classes, 26 its tiles, 27 how many of them are done: 0, 28 the place of
its total.
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
    """Computes one tile after another; whichever program finishes a grid adds up its losses.

    A tile is some cells of one image with all their classes or some. Programs are as many as a GPU runs
    at once: what each has to find out first is found out once.

    Args:
        table: The header, the first tile of each grid, and the grids' fields; see `FIELDS`.
        totals: The losses of grids, float64, each at its place.
        sums: The loss of each tile, float64.
        LOGITS: Type of the logits.
        GRADIENT: Type of the gradients; None if there are none.
        SQUARE: Whether gamma is 2; if not, it is read.
        CELLS_INNER: Whether cells are nearer to each other in memory than classes.
        CELLS: Cells of a tile.
        CLASSES: Classes that are computed at a time.
    """
    firsts = tl.load(table + HEADER + tl.arange(0, MOST_GRIDS))
    number = -1
    done = 0
    for tile in range(tl.program_id(0), tl.load(table + 3).to(tl.int32), tl.num_programs(0)):
        at = tl.sum((firsts <= tile).to(tl.int32), axis=0) - 1
        if at != number:
            if done > 0:
                _finish(table, number, done, totals, sums)
            number = at
            done = 0
        loss = _tile_loss(
            table, number, tile, LOGITS, GRADIENT, SQUARE, CELLS_INNER, CELLS, CLASSES
        )  # fmt: skip
        tl.store(sums + tile, loss)
        done += 1
    if done > 0:
        _finish(table, number, done, totals, sums)


@triton.jit
def _finish(table, number, done, totals, sums):
    """Says that so many more tiles of a grid are done; adds them all up when they are."""
    grid = table + HEADER + MOST_GRIDS + number * FIELDS
    count = tl.load(grid + 26)
    if is_last(grid + 27, done.to(tl.int64), count):
        first = tl.load(table + HEADER + number)
        tl.store(totals + tl.load(grid + 28), sum_of(sums + first, count))


@triton.jit
def _tile_loss(
    table, number, tile,
    LOGITS: tl.constexpr, GRADIENT: tl.constexpr, SQUARE: tl.constexpr, CELLS_INNER: tl.constexpr,
    CELLS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Computes a tile of a grid, and returns its loss."""
    grid = table + HEADER + MOST_GRIDS + number * FIELDS
    place = (tile - tl.load(table + HEADER + number)).to(tl.int32)
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
    has_own = (label >= first) & (label < last)
    own_logits, class_stride = _cells_of(grid, 0, image, cell, LOGITS, CELLS_INNER=False, ALIGNED=False)
    own_logit = tl.load(own_logits + label * class_stride, mask=has_own, other=0.0)
    if tl.load(grid + 22) != 0:
        others = _other_classes(
            table, grid, image, cell, cells, label, first, last,
            LOGITS, GRADIENT, SQUARE, CELLS_INNER, CELLS, CLASSES, ALIGNED=True,
        )  # fmt: skip
    else:
        others = _other_classes(
            table, grid, image, cell, cells, label, first, last,
            LOGITS, GRADIENT, SQUARE, CELLS_INNER, CELLS, CLASSES, ALIGNED=False,
        )  # fmt: skip
    own = _own_class(table, grid, image, cell, label, has_own, own_logit.to(tl.float32), GRADIENT, SQUARE)
    loss = float64_of(tl.load(table + 1)) * others + float64_of(tl.load(table + 2)) * own
    rows = tl.load(grid + 4)
    if rows != 0:
        to = rows.to(tl.pointer_type(tl.float32)) + image * tl.load(grid + 18) + cell * tl.load(grid + 19)
        tl.store(to, loss.to(tl.float32), mask=cell < cells)
    return tl.sum(loss, axis=0)


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
def _other_classes(
    table, grid, image, cell, cells, label, first, last,
    LOGITS: tl.constexpr, GRADIENT: tl.constexpr, SQUARE: tl.constexpr, CELLS_INNER: tl.constexpr,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The cells' losses of classes `first` to `last` but their own, unweighted; gradients are written.

    So is one of nothing for a cell's own class.
    """
    axis: tl.constexpr = 0 if CELLS_INNER else 1
    shape: tl.constexpr = (CLASSES, CELLS) if CELLS_INNER else (CELLS, CLASSES)
    multiple: tl.constexpr = 128 // LOGITS.primitive_bitwidth if ALIGNED else 1
    takes_part = tl.max(label, axis=0) > -2
    cells = _multiple(cells, multiple if CELLS_INNER else 1)
    last = _multiple(last, 1 if CELLS_INNER else multiple)
    cell = tl.expand_dims(cell.to(tl.int64), axis)
    label = tl.expand_dims(label, axis)
    number = tl.expand_dims(_multiple(first, CLASSES) + tl.arange(0, CLASSES), 1 - axis)
    logits, class_stride = _cells_of(grid, 0, image, cell, LOGITS, CELLS_INNER, ALIGNED)
    logits += number * class_stride
    if GRADIENT is not None:
        gradient, step = _cells_of(grid, 1, image, cell, GRADIENT, CELLS_INNER, ALIGNED)
        gradient += number * step
        by, by_low = _factor(float64_of(tl.load(table + 1)) * float64_of(tl.load(grid + 5)))
    gamma = float64_of(tl.load(table))
    others = tl.zeros(shape, tl.float32)
    if takes_part:
        coming = tl.load(logits, mask=(cell < cells) & (number < last), other=_NONE)
        for _ in range(first, last, CLASSES):
            z = coming.to(tl.float32)
            logits += CLASSES * class_stride
            coming = tl.load(logits, mask=(cell < cells) & (number + CLASSES < last), other=_NONE)
            # What a cell that takes no part holds may be NaN, and must not matter.
            counts = (label > -2) & (label != number)
            loss, slope = focal_terms(tl.where(counts, z, _NONE), gamma, SQUARE)
            if not SQUARE:
                counts = counts & (number < last)
                loss, slope = tl.where(counts, loss, 0.0), tl.where(counts, slope, 0.0)
            others += loss
            if GRADIENT is not None:
                value = tl.fma(slope, by, slope * by_low)
                tl.store(gradient, value.to(GRADIENT), mask=(cell < cells) & (number < last))
                gradient += CLASSES * step
            number += CLASSES
    elif GRADIENT is not None:
        for _ in range(first, last, CLASSES):
            tl.store(gradient, tl.zeros(shape, GRADIENT), mask=(cell < cells) & (number < last))
            gradient += CLASSES * step
            number += CLASSES
    return tl.sum(others, axis=axis).to(tl.float64)


@triton.jit
def _own_class(table, grid, image, cell, label, has_own, logit, GRADIENT: tl.constexpr, SQUARE: tl.constexpr):
    """The cells' losses of their own class, unweighted; 0 for a cell that has none here.

    Its gradient is written over what `_other_classes` has written.
    """
    loss, slope = focal_terms(minus(logit), float64_of(tl.load(table)), SQUARE)
    if GRADIENT is not None:
        tl.debug_barrier()
        gradient, step = _cells_of(grid, 1, image, cell, GRADIENT, CELLS_INNER=False, ALIGNED=False)
        by, by_low = _factor(-float64_of(tl.load(table + 2)) * float64_of(tl.load(grid + 5)))  # by -z
        tl.store(gradient + label * step, tl.fma(slope, by, slope * by_low).to(GRADIENT), mask=has_own)
    return tl.where(has_own, loss, 0.0).to(tl.float64)


@triton.jit
def _factor(value):
    """A float64 in two float32, which lose nothing of it that matters here."""
    high = value.to(tl.float32)
    return high, (value - high).to(tl.float32)
