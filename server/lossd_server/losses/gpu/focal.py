"""The focal program, called with tensors."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.gpu.launch import FREE, Launch, Words, address_of, bits_of, run
from lossd_server.losses.gpu.library import loaded_programs

MOST_GRIDS = 32
"""As in programs/focal.py."""

_CELLS = 64
_CLASSES = 16
"""What a program computes at a time: eight logits a thread, which fill its registers."""

_FEW_PROGRAMS = 512
"""Below so many, a grid's classes are divided among programs too: a large GPU runs as many at once."""

_REGISTERS = 128
"""Of a thread: with more, fewer threads run, and memory is waited for."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FocalVariant(NamedTuple):
    """What the focal program is compiled for; everything else is read as it runs.

    Attributes:
        logits: Type of the logits.
        gradient: Type of the gradient, that of the logits or float32; None without a gradient.
        square: Whether gamma is 2.
        cells_inner: Whether cells are nearer to each other in memory than classes.
    """

    logits: torch.dtype
    gradient: torch.dtype | None
    square: bool
    cells_inner: bool

    def constants(self, programs: ModuleType) -> dict[str, object]:
        """Returns the arguments of the program that are constants to its compiler."""
        return {
            "LOGITS": programs.TYPES[self.logits],
            "GRADIENT": programs.TYPES[self.gradient],
            "SQUARE": self.square,
            "CELLS_INNER": self.cells_inner,
            "CELLS": _CELLS,
            "CLASSES": _CLASSES,
            "maxnreg": _REGISTERS,
        }


FOCAL_VARIANTS = frozenset(
    FocalVariant(logits=logits, gradient=gradient, square=square, cells_inner=cells_inner)
    for logits in _DTYPES
    for gradient in {None, logits, torch.float32}
    for square in (True, False)
    for cells_inner in (True, False)
)
"""All there are: what a request can reach is among them, or is computed by torch."""


def focal_sums_on_gpu(grids: Sequence[FocalGrid], constants: FocalConstants) -> FocalSums | None:
    """Returns what `focal_sums` does, by the program; None where that does not apply.

    It applies for every type but float64. All grids take one launch, unless they differ in type or
    layout or are more than 32; the sums take another. Nothing waits for the device.
    """
    programs = loaded_programs()
    if programs is None or not grids or not all(applies(grid, constants) for grid in grids):
        return None
    launches, order = focal_launches(grids, constants, programs)
    losses = in_order(run(launches, grids[0].logits.device, programs), order)
    return FocalSums(losses=losses, finite=None)


def applies(grid: FocalGrid, constants: FocalConstants) -> bool:
    """Whether there is a program for the grid."""
    return (
        variant_of(grid, constants) in FOCAL_VARIANTS
        and (grid.rows is None or grid.rows.dtype == torch.float32)
        and grid.logits.numel() < 1 << 40  # programs are numbered by an int32
        and max(grid.logits.shape) < 1 << 31
    )


def in_order(totals: Tensor, order: Sequence[int]) -> Tensor:
    """Returns totals, which are of the grids that `order` names, in the order of the grids."""
    if list(order) == sorted(order):
        return totals
    return totals[torch.from_numpy(np.argsort(order)).to(totals.device, non_blocking=True)]


def variant_of(grid: FocalGrid, constants: FocalConstants) -> FocalVariant:
    """Returns what the program has to be compiled for."""
    _, class_stride, cell_stride = grid.logits.stride()
    return FocalVariant(
        logits=grid.logits.dtype,
        gradient=None if grid.gradient is None else grid.gradient.dtype,
        square=constants.gamma == 2,
        cells_inner=cell_stride <= class_stride,
    )


def focal_launches(
    grids: Sequence[FocalGrid], constants: FocalConstants, programs: ModuleType
) -> tuple[list[Launch], list[int]]:
    """Returns the launches, and which grid each of their totals is of."""
    launches, order = [], []
    for variant, numbers in _groups(grids, constants):
        launches.append(_launch([grids[i] for i in numbers], constants, variant, programs))
        order += numbers
    return launches, order


def _groups(
    grids: Sequence[FocalGrid], constants: FocalConstants
) -> Iterator[tuple[FocalVariant, list[int]]]:
    """Yields which grids go together: those of one variant, up to `MOST_GRIDS`."""
    variants = [variant_of(grid, constants) for grid in grids]
    for variant in dict.fromkeys(variants):
        numbers = [i for i, its in enumerate(variants) if its == variant]
        for first in range(0, len(numbers), MOST_GRIDS):
            yield variant, numbers[first : first + MOST_GRIDS]


def _launch(
    grids: Sequence[FocalGrid], constants: FocalConstants, variant: FocalVariant, programs: ModuleType
) -> Launch:
    shares = [_shares(grid) for grid in grids]
    counts = [
        grid.logits.shape[0] * blocks * parts for grid, (_, blocks, parts) in zip(grids, shares, strict=True)
    ]
    ends = [0, *accumulate(counts)]
    firsts = [*ends[:-1], *[FREE] * (MOST_GRIDS - len(grids))]
    header = [*map(bits_of, (constants.gamma, constants.negative_weight, constants.positive_weight)), 0]
    labels = [_labels(grid) for grid in grids]
    fields = list(map(_fields, grids, labels, [variant] * len(grids), shares))
    return Launch(
        program="focal_program",
        words=[*header, *firsts, *chain.from_iterable(fields)],
        program_count=ends[-1],
        spans=list(pairwise(ends)),
        constants=variant.constants(programs),
        tensors=labels,
    )


def _labels(grid: FocalGrid) -> Tensor:
    """Returns the labels as the program reads them: int32 or int64."""
    return grid.labels if grid.labels.dtype in {torch.int32, torch.int64} else grid.labels.to(torch.int32)


def _shares(grid: FocalGrid) -> tuple[int, int, int]:
    """Returns the classes of a program, the blocks of cells and the parts of classes of an image.

    They depend on the grid alone: the order in which its losses are added up must not depend on its
    company. Rows are written whole.
    """
    images, classes, cells = grid.logits.shape
    blocks = -(-cells // _CELLS)
    divided = grid.rows is None and images * blocks < _FEW_PROGRAMS
    width = _CLASSES if divided else max(-(-classes // _CLASSES), 1) * _CLASSES
    return width, blocks, max(-(-classes // width), 1)


def _fields(grid: FocalGrid, labels: Tensor, variant: FocalVariant, shares: tuple[int, int, int]) -> Words:
    """Returns the grid's words; the program knows them by their places."""
    gradient = grid.logits if grid.gradient is None else grid.gradient
    ignored = labels if grid.ignored is None else grid.ignored
    rows = labels if grid.rows is None else grid.rows
    width, blocks, parts = shares
    return [
        *map(address_of, (grid.logits, grid.gradient, labels, grid.ignored, grid.rows)),
        bits_of(grid.scale),
        *grid.logits.shape[1:],
        *grid.logits.stride(),
        *gradient.stride(),
        *labels.stride(),
        *ignored.stride(),
        *rows.stride(),
        labels.dtype == torch.int64,
        grid.background,
        _aligned(grid.logits, variant) and _aligned(gradient, variant),
        width,
        blocks,
        parts,
    ]


def _aligned(tensor: Tensor, variant: FocalVariant) -> bool:
    """Whether numbers lie side by side, and lines of them begin and end on 16 bytes."""
    batch_stride, *strides = tensor.stride()
    inner, outer = reversed(strides) if variant.cells_inner else strides
    length = tensor.shape[2 if variant.cells_inner else 1]
    multiple = 16 // tensor.element_size()
    return (
        inner == 1
        and not any(n % multiple for n in (batch_stride, outer, length))
        and not tensor.data_ptr() % 16
    )
