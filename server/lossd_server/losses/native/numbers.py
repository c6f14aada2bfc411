"""What the kernels' C structures are filled with."""

from typing import Any

import ml_dtypes
import numpy as np
import torch

FLOAT_TYPES: dict[Any, int] = {
    torch.float32: 0,
    np.dtype(np.float32): 0,
    torch.float16: 1,
    np.dtype(np.float16): 1,
    torch.bfloat16: 2,
    np.dtype(ml_dtypes.bfloat16): 2,
}
"""Types that the kernels read and write, torch's and numpy's, by their numbers in arithmetic.h."""

WIDE_TYPES = {**FLOAT_TYPES, torch.float64: 3, np.dtype(np.float64): 3}
"""The same, and the type that they only read."""


def thread_count(work: int, small: int) -> int:
    """Returns the threads for so much work: one below what another costs more than it saves."""
    return 1 if work < small else torch.get_num_threads()
