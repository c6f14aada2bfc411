"""What the kernels' C structures are filled with."""

import torch
from torch import Tensor

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types that the kernels read and write, by their numbers in arithmetic.h."""

WIDE_TYPES = {**FLOAT_TYPES, torch.float64: 3}
"""The same, and the type that they only read."""


def address(tensor: Tensor | None) -> int | None:
    """Returns where a tensor's elements begin; None, the null pointer, where there is none."""
    return None if tensor is None else tensor.data_ptr()


def thread_count(work: int, small: int) -> int:
    """Returns the threads for so much work: one below what another costs more than it saves."""
    return 1 if work < small else torch.get_num_threads()
