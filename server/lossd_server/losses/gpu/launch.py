"""Launches programs over tables of addresses: one upload at most, no wait."""

import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate, chain
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound=Hashable)

Words = list[int]
"""Part of a table: int64, as a list until all of it is there, which is quicker than arrays of a few."""

_KEPT_TABLES = 256
"""Of what was launched last: a few kB each."""

FREE = (1 << 63) - 1
"""Where the first program of a grid or group that is not there would be."""

_OPTIONS = {
    # The programs say themselves what is fused: else the same logit could come out otherwise elsewhere.
    "enable_fp_fusion": False,
}


class Launch(NamedTuple):
    """One launch.

    Attributes:
        program: Name of the program.
        words: Its table.
        program_count: How many of it run.
        sum_count: How many sums they put down for the one that is done last.
        constants: What the program is compiled for, and how.
        tensors: What the table points to and nobody else holds.
    """

    program: str
    words: Words
    program_count: int
    sum_count: int
    constants: Mapping[str, Any]
    tensors: Sequence[Tensor] = ()


def run(launches: Sequence[Launch], total_count: int, device: torch.device, programs: ModuleType) -> Tensor:
    """Runs launches, and returns the totals that they write: float64 on the device.

    Addresses, sizes and strides go by a table and never as arguments, for which Triton would compile
    again: where they are 1, or multiples of 16. Whoever comes again with the same, as the next step of a
    training does, finds its table there.
    """
    padded = [launch.words + [0] * (len(launch.words) % 2) for launch in launches]
    tables = _tables(tuple(chain(*padded)), device)
    sizes = [_even(launch.sum_count) for launch in launches]
    # Apart from each other: whoever keeps a loss keeps few numbers with it.
    totals = torch.empty(total_count, dtype=torch.float64, device=device)
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    table_places = accumulate(map(len, padded), initial=0)
    sum_places = accumulate(sizes, initial=0)
    with _on(device):
        for launch, table, place in zip(launches, table_places, sum_places, strict=False):
            program = getattr(programs, launch.program)[launch.program_count,]
            program(tables[table:], totals, sums[place:], **launch.constants, **_OPTIONS)
    return totals


def bits_of(value: float) -> int:
    """Returns the bits of a float64, as a word."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def address_of(tensor: Tensor | None) -> int:
    """Returns where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def alike(variants: Sequence[T], most: int) -> Iterator[tuple[T, list[int]]]:
    """Yields each variant with the places where it stands, so many of them at a time."""
    for variant in dict.fromkeys(variants):
        places = [place for place, its in enumerate(variants) if its == variant]
        for first in range(0, len(places), most):
            yield variant, places[first : first + most]


def _even(count: int) -> int:
    """Returns the count, or one more: what follows begins on 16 bytes."""
    return count + count % 2


def _tables(words: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns words on the device, where they may be already."""
    if device.type != "cuda":
        return _uploaded(words, device, 0)
    # What a graph uploads is not there before it is replayed.
    upload = _uploaded.__wrapped__ if torch.cuda.is_current_stream_capturing() else _uploaded
    return upload(words, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(_KEPT_TABLES)
def _uploaded(words: tuple[int, ...], device: torch.device, _stream: int) -> Tensor:
    """Returns words on the device; so few go with the command itself, and have been read when this returns.

    A table is of one stream, whose launches come one after another: programs count there what is done, and
    the last of them puts the count back.
    """
    return torch.from_numpy(np.array(words, np.int64)).to(device, non_blocking=True)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
