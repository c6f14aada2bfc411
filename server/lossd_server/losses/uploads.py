"""Arrays of the host as tensors of a device: many of them in one copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.arrays import in_rows

_ALIGNMENT = 16
"""Bytes: the widest that a GPU reads at a time."""


def uploaded(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Returns arrays as tensors, in order: on the host their very memory, on a GPU one copy of all.

    Nobody waits for it: it comes from pinned memory, which torch keeps until it has been read.
    """
    if device.type == "cpu":
        return [torch.from_numpy(in_rows(array)) for array in arrays]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    to = staging.numpy()
    for start, array in zip(starts, arrays, strict=True):
        np.copyto(to[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
    there = staging.to(device, non_blocking=True)
    types = {dtype: torch.from_numpy(np.empty(0, dtype)).dtype for dtype in {a.dtype for a in arrays}}
    return [
        there[start : start + array.nbytes].view(types[array.dtype]).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
