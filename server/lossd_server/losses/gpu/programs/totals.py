"""Sums of consecutive numbers, in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def totals_program(spans, sums, totals, WIDTH: tl.constexpr):
    """Writes the sum of one span of `sums`; two words a span: where it begins, and where it ends."""
    span = tl.program_id(0)
    stop = tl.load(spans + 2 * span + 1)
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(tl.load(spans + 2 * span), stop, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(sums + at, mask=at < stop, other=0.0)
    tl.store(totals + span, tl.sum(total, axis=0))
