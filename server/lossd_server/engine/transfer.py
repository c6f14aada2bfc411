"""Between numpy arrays on the host and torch tensors on the device, bit for bit."""

import warnings
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.losses.evaluation import Numbers

# Requests are read-only views of received bytes, and nothing of ours writes to its inputs. Torch warns
# of such arrays once a process: here, and unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_device(value: Any, device: torch.device) -> Any:
    """Returns arrays, and arrays in lists, as tensors on the device; anything else as it is."""
    if isinstance(value, list):
        return [to_device(entry, device) for entry in value]
    if not isinstance(value, np.ndarray):
        return value
    tensor = from_host(value)
    # To a GPU the driver copies by way of memory of its own: the array has been read when this returns.
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


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
    copies = list(map(_copy_under_way, tensors)) if devices else tensors
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return list(map(_array, copies))


def _copy_under_way(tensor: Tensor) -> Tensor:
    """Returns a tensor of the host's that holds the values once the stream has come so far.

    Pinned memory is written by the GPU itself; torch keeps it for the next time.
    """
    if not tensor.is_cuda:
        return tensor
    tensor = tensor.detach()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(_BFLOAT16)
    array: NDArray[Any] = tensor.numpy()
    return array


def from_host(array: NDArray[Any]) -> Tensor:
    """Returns the very memory of an array as a tensor."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
