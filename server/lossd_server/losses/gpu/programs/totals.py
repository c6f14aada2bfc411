"""Sums of what the programs of a launch found, in a fixed order, by whichever of them is done last."""

import triton
import triton.language as tl

_WIDTH = tl.constexpr(1024)


@triton.jit
def is_last(done, count):
    """Counts a program as done; whether all `count` are now, and what others have stored can be read.

    Nothing is counted then any more, for who comes with this table next.
    """
    last = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(done, 0)
    return last


@triton.jit
def sum_of(numbers, count):
    """The sum of so many float64, in the same order whoever adds them up."""
    total = tl.zeros((_WIDTH,), tl.float64)
    for start in range(0, count, _WIDTH):
        at = start + tl.arange(0, _WIDTH)
        total += tl.load(numbers + at, mask=at < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def zero_program(_table, totals, _sums):
    """Writes a total of nothing: what is tried first of all."""
    tl.store(totals, 0.0)
