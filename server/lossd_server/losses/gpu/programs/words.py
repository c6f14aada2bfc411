"""Words of a table: int64, which hold addresses, numbers, and the bits of a float64."""

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, None: None}
"""Triton's names of the types that are read and written."""


@triton.jit
def float64_of(word):
    """The float64 whose bits a word holds."""
    return word.to(tl.float64, bitcast=True)


@triton.jit
def scale_of(address, word):
    """What an address holds, or, where there is none, the float64 of a word; of scalars or of rows."""
    to = address.to(tl.pointer_type(tl.float64), bitcast=True)
    return tl.where(address != 0, tl.load(to, mask=address != 0, other=0.0), float64_of(word))
