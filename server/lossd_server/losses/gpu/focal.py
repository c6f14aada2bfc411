"""The focal program, called with tensors."""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, FocalSums
from lossd_server.losses.gpu.launch import FREE, Launch, Words, address_of, alike, bits_of, run
from lossd_server.losses.gpu.library import loaded_programs

MOST_GRIDS = 32
"""As in programs/focal.py."""

_ROOM_WITHOUT_GPU = 1024
"""Programs at a time, where there is no GPU to be asked."""

_REGISTERS = 1 << 16
"""Of a multiprocessor, on every GPU that Triton compiles for."""

_STEPS_TO_BEGIN = 2
"""What a program takes to begin and to end, in steps, measured on an H100."""

_MOST_ROUNDS = 8
"""In which the programs of a grid run: with more, what begins and ends is more than what is left over."""

_REMEMBERED_DIVISIONS = 1024


class _Tile(NamedTuple):
    """What is computed at a time, and with what.

    Attributes:
        classes: Classes, a power of 2.
        cells: Cells, a power of 2.
        warps: Groups of 32 threads.
        registers: Most registers of a thread: with more, fewer threads run, and memory is waited for.
    """

    classes: int
    cells: int
    warps: int
    registers: int


_CELLS_INNER = _Tile(classes=1, cells=512, warps=2, registers=96)
_CLASSES_INNER = _Tile(classes=16, cells=64, warps=4, registers=96)

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

    @property
    def tile(self) -> _Tile:
        """What is computed at a time."""
        return _CELLS_INNER if self.cells_inner else _CLASSES_INNER

    def constants(self, programs: ModuleType) -> dict[str, object]:
        """Returns the arguments of the program that are constants to its compiler."""
        return {
            "LOGITS": programs.TYPES[self.logits],
            "GRADIENT": programs.TYPES[self.gradient],
            "SQUARE": self.square,
            "CELLS_INNER": self.cells_inner,
            "CELLS": self.tile.cells,
            "CLASSES": self.tile.classes,
            "num_warps": self.tile.warps,
            "maxnreg": self.tile.registers,
        }


FOCAL_VARIANTS = frozenset(
    FocalVariant(logits=logits, gradient=gradient, square=square, cells_inner=cells_inner)
    for logits in _DTYPES
    for gradient in {None, logits, torch.float32}
    for square in (True, False)
    for cells_inner in (True, False)
)
"""All there are: what a request can reach is among them, or is computed by torch."""


def focal_sums_on_gpu(grids: Sequence[FocalGrid[Tensor]], constants: FocalConstants) -> FocalSums | None:
    """Returns what `focal_sums` does, by the program; None where that does not apply.

    It applies for every type but float64. All grids take one launch, unless they differ in type or
    layout or are more than 32. Nothing waits for the device.
    """
    programs = loaded_programs()
    if programs is None or not grids or not all(applies(grid, constants) for grid in grids):
        return None
    launches = focal_launches(grids, constants, programs, len(grids))
    totals = run(launches, 2 * len(grids), grids[0].logits.device, programs)
    losses, means = totals[: len(grids)], totals[len(grids) :].view(torch.float32)[::2]
    return FocalSums(losses=losses, finite=None, means=means)


def applies(grid: FocalGrid[Tensor], constants: FocalConstants) -> bool:
    """Whether there is a program for the grid."""
    return (
        variant_of(grid, constants) in FOCAL_VARIANTS
        and (grid.rows is None or grid.rows.dtype == torch.float32)
        and grid.logits.numel() < 1 << 40  # programs are numbered by an int32
        and max(grid.logits.shape) < 1 << 31
    )


def variant_of(grid: FocalGrid[Tensor], constants: FocalConstants) -> FocalVariant:
    """Returns what the program has to be compiled for."""
    _, class_stride, cell_stride = grid.logits.stride()
    return FocalVariant(
        logits=grid.logits.dtype,
        gradient=None if grid.gradient is None else grid.gradient.dtype,
        square=constants.gamma == 2,
        cells_inner=cell_stride <= class_stride,
    )


def focal_launches(
    grids: Sequence[FocalGrid[Tensor]], constants: FocalConstants, programs: ModuleType, first_mean: int
) -> list[Launch]:
    """Returns the launches: grids of one variant go together, up to `MOST_GRIDS`.

    Totals are losses in the order of grids, and means, from `first_mean` on: float32 in the room of float64.
    """
    variants = [variant_of(grid, constants) for grid in grids]
    return [
        _launch(grids, numbers, constants, variant, programs, first_mean)
        for variant, numbers in alike(variants, MOST_GRIDS)
    ]


def _launch(
    grids: Sequence[FocalGrid[Tensor]],
    numbers: Sequence[int],
    constants: FocalConstants,
    variant: FocalVariant,
    programs: ModuleType,
    first_mean: int,
) -> Launch:
    labels = [_labels(grids[i]) for i in numbers]
    shares = [_shares(grids[i], variant.tile) for i in numbers]
    counts = [share.tile_count for share in shares]
    weights = (constants.gamma, constants.negative_weight, constants.positive_weight)
    header = [*map(bits_of, weights), 0]
    firsts = [*accumulate(counts[:-1], initial=0), *[FREE] * (MOST_GRIDS - len(numbers))]
    fields = [
        [*_fields(grids[i], mine, variant, share), 0, i, first_mean + i, bits_of(grids[i].divisor)]
        for i, mine, share in zip(numbers, labels, shares, strict=True)
    ]
    return Launch(
        program="focal_program",
        words=[*header, *firsts, *chain.from_iterable(fields)],
        program_count=sum(counts),
        sum_count=sum(counts),
        constants=variant.constants(programs),
        tensors=labels,
    )


def _labels(grid: FocalGrid[Tensor]) -> Tensor:
    """Returns the labels as the program reads them: int32 or int64."""
    return grid.labels if grid.labels.dtype in {torch.int32, torch.int64} else grid.labels.to(torch.int32)


class _Shares(NamedTuple):
    """How a grid is divided: by itself alone, for so its losses are added up in any company.

    Attributes:
        width: Classes of a tile.
        blocks: Blocks of cells of an image.
        parts: Parts of classes.
        tile_count: Tiles in all; one where there is nothing to do, for the total.
    """

    width: int
    blocks: int
    parts: int
    tile_count: int


def _shares(grid: FocalGrid[Tensor], tile: _Tile) -> _Shares:
    """Returns how a grid is divided. Rows are written whole."""
    images, classes, cells = grid.logits.shape
    blocks = -(-cells // tile.cells)
    steps_each = steps = max(-(-classes // tile.classes), 1)
    if grid.rows is None:
        steps_each = _steps_each(max(images * blocks, 1), steps, _room(grid.logits.device, tile))
    parts = -(-steps // steps_each)
    return _Shares(steps_each * tile.classes, max(blocks, 1), parts, max(images * blocks * parts, 1))


@cache
def _room(device: torch.device, tile: _Tile) -> int:
    """Returns how many programs a GPU works on at a time: those that it has registers and threads for."""
    if device.type != "cuda":
        return _ROOM_WITHOUT_GPU
    gpu = torch.cuda.get_device_properties(device)
    threads = 32 * tile.warps
    by_registers = _REGISTERS // (threads * tile.registers)
    by_threads = gpu.max_threads_per_multi_processor // threads
    return int(gpu.multi_processor_count * max(min(by_registers, by_threads), 1))


@lru_cache(_REMEMBERED_DIVISIONS)
def _steps_each(blocks: int, steps: int, room: int) -> int:
    """Returns how many steps a program is given, so that those of a grid are done soonest.

    Where there is one program more than there is room for, it runs alone when all others are done. So what
    fills the room is looked at, once or several times.

    Args:
        blocks: Blocks of cells of all images.
        steps: Steps that each of them takes.
        room: Programs that run at a time.
    """

    def time_of(steps_each: int) -> float:
        rounds, rest = divmod(blocks * -(-steps // steps_each), room)
        time = float(rounds) * (steps_each + _STEPS_TO_BEGIN)
        if rest:
            # Memory answers one program hardly sooner than half of them.
            time += (1 + (rest / room) ** 2) / 2 * steps_each + _STEPS_TO_BEGIN
        return time

    parts = (min(max(rounds * room // blocks, 1), steps) for rounds in range(1, _MOST_ROUNDS + 1))
    return min((-(-steps // some) for some in parts), key=time_of)


def _fields(grid: FocalGrid[Tensor], labels: Tensor, variant: FocalVariant, shares: _Shares) -> Words:
    """Returns the grid's words but the last four; the program knows them by their places."""
    gradient = grid.logits if grid.gradient is None else grid.gradient
    ignored = labels if grid.ignored is None else grid.ignored
    rows = labels if grid.rows is None else grid.rows
    images, classes, cells = grid.logits.shape
    return [
        *map(address_of, (grid.logits, grid.gradient, labels, grid.ignored, grid.rows)),
        bits_of(grid.scale),
        classes,
        cells if images else 0,
        *grid.logits.stride(),
        *gradient.stride(),
        *labels.stride(),
        *ignored.stride(),
        *rows.stride(),
        labels.dtype == torch.int64,
        grid.background,
        _aligned(grid.logits, variant) and _aligned(gradient, variant),
        *shares,
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
