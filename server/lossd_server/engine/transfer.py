"""Between numpy arrays on the host and torch tensors on the device, bit for bit."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd.gpu_memory import GpuArray
from lossd_server.losses.arrays import as_array
from lossd_server.losses.evaluation import Numbers
from lossd_server.losses.uploads import uploaded

# Requests are read-only views of received bytes, and nothing of ours writes to its inputs. Torch warns
# of such arrays once a process: here, and unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SMALL = 1 << 18
"""Bytes that a GPU copies while it is told to copy: what is smaller goes together with others."""


def to_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns arguments with arrays, and arrays in lists, as tensors on the device; the rest as it is.

    What lies on the GPU already is not moved.
    """
    arrays = [array for value in arguments.values() for array in _arrays_in(value)]
    tensors = iter(_moved(arrays, device))
    return {name: _replaced(value, tensors) for name, value in arguments.items()}


def _arrays_in(value: Any) -> Sequence[NDArray[Any]]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, np.ndarray)]


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, list):
        return [_replaced(entry, tensors) for entry in value]
    if isinstance(value, GpuArray):
        return on_gpu(value)
    return next(tensors) if isinstance(value, np.ndarray) else value


def _moved(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return list(map(from_host, arrays))
    small = iter(uploaded([_plain(array) for array in arrays if array.nbytes < _SMALL], device))
    return [
        _typed(next(small), array)
        if array.nbytes < _SMALL
        # By way of memory of the driver's own: the array has been read when this returns.
        else from_host(array).to(device, non_blocking=True)
        for array in arrays
    ]


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array that torch knows the type of, of the same bits."""
    return array.view(np.uint16) if array.dtype == _BFLOAT16 else array


def _typed(tensor: Tensor, array: NDArray[Any]) -> Tensor:
    return tensor.view(torch.bfloat16) if array.dtype == _BFLOAT16 else tensor


def to_host(
    numbers: Sequence[float | Numbers], tensors: Sequence[Tensor]
) -> tuple[list[NDArray[np.float64]], list[NDArray[Any]]]:
    """Returns what a device found; from a GPU with one wait for all.

    Args:
        numbers: Numbers and rows of them: each becomes a float64 row.
        tensors: Tensors: each becomes an array of its values, bfloat16 as `ml_dtypes.bfloat16`.
    """
    rows = [number.double().flatten() for number in numbers if isinstance(number, Tensor)]
    if not rows:
        return list(map(_row, numbers)), _fetched(tensors)
    *fetched, row = _fetched([*tensors, torch.cat(rows)])
    split = iter(np.split(row, np.cumsum([len(row) for row in rows])[:-1]))
    return [next(split) if isinstance(number, Tensor) else _row(number) for number in numbers], fetched


def _row(number: float | Numbers) -> NDArray[np.float64]:
    return number if isinstance(number, np.ndarray) else np.array([number], np.float64)


def _fetched(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    copies = _copies_under_way(tensors) if devices else tensors
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return list(map(as_array, copies))


def _copies_under_way(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors of the host's that hold the values once the streams have come so far."""
    small = [tensor for tensor in tensors if tensor.is_cuda and tensor.nbytes < _SMALL]
    together = _small_copies_under_way(small)
    return [together[tensor] if tensor in together else _copy_under_way(tensor) for tensor in tensors]


def _small_copies_under_way(tensors: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Returns the same of the tensors of one GPU, by one copy."""
    if not tensors:
        return {}
    # The widest first: so each begins at a multiple of its own width.
    ordered = sorted(tensors, key=Tensor.element_size, reverse=True)
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in ordered])
    parts = torch.split(_copy_under_way(flat), [tensor.nbytes for tensor in ordered])
    return {
        tensor: part.view(tensor.dtype).view(tensor.shape)
        for tensor, part in zip(ordered, parts, strict=True)
    }


def _copy_under_way(tensor: Tensor) -> Tensor:
    """Returns a tensor of the host's that holds the values once the stream has come so far.

    Pinned memory is written by the GPU itself; torch keeps it for the next time.
    """
    if not tensor.is_cuda:
        return tensor
    tensor = tensor.detach()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def as_tensor(array: NDArray[Any] | GpuArray) -> Tensor:
    """Returns the very memory of an array as a tensor, wherever it lies."""
    return on_gpu(array) if isinstance(array, GpuArray) else from_host(array)


def on_gpu(array: GpuArray) -> Tensor:
    """Returns the very memory of an array on a GPU as a tensor."""
    device = torch.device("cuda", array.memory.ordinal)
    if array.dtype == _BFLOAT16:
        return torch.as_tensor(array.bits, device=device).view(torch.bfloat16)
    return torch.as_tensor(array, device=device)


def from_host(array: NDArray[Any]) -> Tensor:
    """Returns the very memory of an array as a tensor."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
