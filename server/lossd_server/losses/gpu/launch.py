"""Launches programs over tables of addresses, and adds up what they found: one upload, no wait."""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Words = list[int]
"""Part of a table: int64, as a list until all of it is there, which is quicker than arrays of a few."""

FREE = (1 << 63) - 1
"""Where the first program or location of a grid or level that is not there would be."""

_WIDTH_OF_TOTALS = 1024
_OPTIONS = {
    "num_warps": 4,
    # The programs say themselves what is fused: else the same logit could come out otherwise elsewhere.
    "enable_fp_fusion": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch.

    Attributes:
        program: Name of the program.
        words: Its table.
        program_count: How many of it run.
        spans: What to add up of the numbers that they write: where each total begins and ends.
        constants: What the program is compiled for, and how.
        tensors: What the table points to and nobody else holds.
    """

    program: str
    words: Words
    program_count: int
    spans: Sequence[tuple[int, int]]
    constants: Mapping[str, Any]
    tensors: Sequence[Tensor] = ()


def run(launches: Sequence[Launch], device: torch.device, programs: ModuleType) -> Tensor:
    """Runs launches, and one more for the totals of all their spans, which it returns: float64 on the device.

    Addresses, sizes and strides go by a table and never as arguments, for which Triton would compile
    again: where they are 1, or multiples of 16.
    """
    starts = list(_places([_end(launch) for launch in launches]))
    spans = [
        (a + start, b + start)
        for launch, start in zip(launches, starts, strict=False)
        for a, b in launch.spans
    ]
    tables = [*(launch.words for launch in launches), [place for span in spans for place in span]]
    places = list(_places(map(len, tables)))
    uploaded = _upload([word for table in tables for word in (*table, *[0] * (len(table) % 2))], device)
    sums = torch.empty(starts[-1], dtype=torch.float64, device=device)
    totals = torch.empty(len(spans), dtype=torch.float64, device=device)
    with _on(device):
        for launch, place, start in zip(launches, places, starts, strict=False):
            if launch.program_count:
                program = getattr(programs, launch.program)
                program[launch.program_count,](uploaded[place:], sums[start:], **launch.constants, **_OPTIONS)
        if spans:
            totals_program = programs.totals_program[len(spans),]
            totals_program(uploaded[places[-2] :], sums, totals, WIDTH=_WIDTH_OF_TOTALS, **_OPTIONS)
    return totals


def bits_of(value: float) -> int:
    """Returns the bits of a float64, as a word."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def address_of(tensor: Tensor | None) -> int:
    """Returns where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _end(launch: Launch) -> int:
    return max((stop for _, stop in launch.spans), default=0)


def _places(lengths: Iterable[int]) -> Iterator[int]:
    """Yields where parts of these lengths begin, each on 16 bytes, and where the last one ends."""
    place = 0
    for length in lengths:
        yield place
        place += length + length % 2
    yield place


def _upload(words: Words, device: torch.device) -> Tensor:
    """Copies from pinned memory: nobody waits, and the memory is not used again before it was read."""
    table = torch.from_numpy(np.array(words, np.int64))
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
