"""Whatever a caller holds, as a numpy array: torch tensors too, without importing torch."""

import sys
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lossd.gpu_memory import GpuArray

Array = NDArray[Any]
AnyArray = Array | GpuArray
"""An array of the host's memory, or of a GPU's that is shared with a server."""


def as_array(value: Any) -> Array:
    """Returns a value as numpy, without a copy where its memory allows.

    Takes numpy arrays, shared arrays of a GPU, numbers and nested lists, anything with `__array__` or
    `__dlpack__`, and torch tensors of every dtype, on any device, with or without a gradient.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, GpuArray):
        return value.numpy()
    torch = sys.modules.get("torch")  # a caller who has a tensor has imported torch
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(value, torch)
    if not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def host_arrays(values: Iterable[Any]) -> list[Array] | None:
    """Returns arrays, and torch tensors of the host, as numpy; None where there is anything else."""
    arrays: list[Array] = []
    torch = sys.modules.get("torch")
    for value in values:
        if isinstance(value, np.ndarray):
            arrays.append(value)
        elif torch is not None and isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arrays.append(_from_torch(value, torch))
        else:
            return None
    return arrays


def _from_torch(tensor: Any, torch: Any) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array
