"""Where gradients are written."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.arrays import A, is_on_host
from lossd_server.losses.evaluation import EvaluationOptions

_NUMPY_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.int16),
}
"""What numpy has of the size of each type."""


def gradient_buffers(options: EvaluationOptions, name: str, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns an uninitialised tensor for the gradient of each of an argument's tensors, None if not wanted.

    Those that the caller brought, or new ones. All are dense, and `grid` is a view of each.
    """
    if name not in options.gradients:
        return None
    given = options.outputs.get(name)
    return list(given) if given is not None else [_empty(tensor, options) for tensor in inputs]


def clear(buffers: Sequence[A]) -> None:
    """Fills dense tensors of one device, or arrays, with zeros; on a CPU without waking torch's helpers."""
    if buffers and not is_on_host(buffers[0]):
        # One launch; what torch's own optimizers call.
        torch._foreach_zero_(list(buffers))  # type: ignore[arg-type]  # tensors
        return
    for buffer in buffers:
        if isinstance(buffer, np.ndarray):
            buffer.fill(0)
        else:
            ctypes.memset(buffer.data_ptr(), 0, buffer.nbytes)


def _empty(tensor: Tensor, options: EvaluationOptions) -> Tensor:
    """Returns an uninitialised tensor laid out like another, as far as that one is dense."""
    dtype = options.gradient_dtype or tensor.dtype
    if options.allocate is not None and tensor.is_cpu:
        memory = options.allocate(tensor.numel() * dtype.itemsize)
        if memory is not None:
            return _laid_out(memory, dtype, tensor)
    if tensor.is_contiguous():
        return torch.empty_like(tensor, dtype=dtype)
    return torch.empty_strided(tensor.shape, _dense_strides(tensor), dtype=dtype, device=tensor.device)


def _laid_out(memory: NDArray[np.uint8], dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Returns memory as elements of a type, laid out like a tensor: by numpy, which takes half as long."""
    twin = _NUMPY_TYPES[dtype]
    strides = None if tensor.is_contiguous() else [twin.itemsize * n for n in _dense_strides(tensor)]
    laid_out = torch.from_numpy(np.ndarray(tensor.shape, twin, memory, strides=strides))
    return laid_out if laid_out.dtype is dtype else laid_out.view(dtype)


def _dense_strides(tensor: Tensor) -> Sequence[int]:
    """Returns row-major strides, or those of maps with their channels last, or of rows class by class."""
    if tensor.dim() == 2 and tensor.stride(0) == 1 != tensor.stride(1):
        return 1, len(tensor)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        _, channels, height, width = tensor.shape
        return channels * height * width, 1, width * channels, channels
    strides = [1]
    for extent in reversed(tensor.shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return strides[::-1] if tensor.dim() else ()
