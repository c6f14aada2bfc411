"""Which device evaluates."""

from collections.abc import Mapping

import torch

from lossd_server.errors import ConfigurationError, Reason
from lossd_server.kernels import loaded_library
from lossd_server.losses.gpu import loaded_programs


def resolve_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` is the first GPU, else the CPU.

    Raises:
        ConfigurationError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise ConfigurationError(
            Reason.INVALID_OPTION, f"is {name!r}, want auto, cpu, cuda or cuda:N", field="device"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            Reason.INVALID_OPTION,
            f"is {name!r}, but {torch.cuda.device_count()} CUDA devices are here",
            field="device",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def describe_device(device: torch.device) -> str:
    """Returns the device's name for people, e.g. `cuda:0 (NVIDIA H200)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels evaluate on the device, and not the slower operations of torch."""
    return (loaded_programs() if device.type == "cuda" else loaded_library()) is not None


def device_memory(device: torch.device) -> Mapping[str, int]:
    """Returns the memory of a GPU in bytes; nothing for the CPU, and for a GPU that does not answer.

    `allocated` is in tensors, `reserved` is what torch holds for them, `free` what the GPU has left for
    whoever asks, and `total` all it has.
    """
    if device.type != "cuda":
        return {}
    try:
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    except RuntimeError:
        return {}
    return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}
