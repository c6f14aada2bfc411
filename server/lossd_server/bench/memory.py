"""How much more memory a call takes at its peak."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SAMPLE_SECONDS = 0.0005


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Calls once and returns how much more memory than before was in use at the peak.

    On CUDA the device memory that torch allocated; on a CPU the resident memory of this process,
    results included. None where the system does not say.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    before_resident = _resident("VmRSS")
    if before_resident is None:
        call()
        return None
    peak = _peak_by_mark(call) if _reset_peak() else _peak_by_samples(call)
    return None if peak is None else max(peak - before_resident, 0)


def available_bytes() -> int | None:
    """Returns how much memory the host can still give, or None where it does not say."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _peak_by_mark(call: Callable[[], object]) -> int | None:
    call()
    return _resident("VmHWM")


def _peak_by_samples(call: Callable[[], object]) -> int | None:
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            samples.append(_resident("VmRSS") or 0)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    return max(samples, default=None)


def _return_free_memory() -> None:
    """Gives free heap back, or memory that stays from an earlier call would hide what this one takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _reset_peak() -> bool:
    """Sets the peak of the resident memory back to what it is now; false where that is not permitted."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(file: Path, name: str) -> int | None:
    """Returns a size, given in kB, from a file of `name: number` lines."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
