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
