"""Finds Triton and the programs written in it, if they work here."""

import os
import threading
import warnings
from functools import lru_cache
from types import ModuleType

import torch

from lossd_server.kernels import load_library
from lossd_server.kernels.library import cache_directory
from lossd_server.losses.gpu.launch import Launch, run

_lock = threading.Lock()
_loaded: list[ModuleType] = []
_given_up = threading.Event()


def load_kernels(device: torch.device | None = None) -> None:
    """Loads what computes on the CPU and on a GPU, compiled now if need be; None means a GPU in use."""
    load_library()
    if device is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        load_programs(device)


def loaded_programs() -> ModuleType | None:
    """Returns the programs if they are loaded; never imports or compiles."""
    return _loaded[0] if _loaded else None


def load_programs(device: torch.device) -> ModuleType | None:
    """Returns the programs, imported and tried on the device now if need be.

    From then on each is compiled when it is first wanted, unless `compile_programs` has done it.
    None, and one `RuntimeWarning`, where Triton is missing or cannot compile.
    """
    if not _loaded and (programs := find_programs(device)) is not None:
        use_programs(programs)
    return loaded_programs()


def find_programs(device: torch.device) -> ModuleType | None:
    """Returns what `load_programs` does, but nobody else comes to use them by this."""
    with _lock:
        return None if _given_up.is_set() else _find(device)


def use_programs(programs: ModuleType) -> None:
    """Has the programs used from now on, unless they were given up."""
    with _lock:
        if not _given_up.is_set():
            _loaded[:] = [programs]


def give_up(error: Exception) -> None:
    """Goes on without programs from now on, and says so."""
    with _lock:
        _given_up.set()
        _loaded.clear()
    _warn(error)


@lru_cache(maxsize=1)
def _find(device: torch.device) -> ModuleType | None:
    try:
        if "LOSSD_CACHE_DIR" in os.environ:
            os.environ.setdefault("TRITON_CACHE_DIR", str(cache_directory() / "triton"))
        _require_nvidia()
        from lossd_server.losses.gpu import programs  # noqa: PLC0415  # needs Triton

        trial = Launch(program="zero_program", words=[0, 0], program_count=1, sum_count=1, constants={})
        run([trial], 1, device, programs)  # builds Triton's launcher, which takes a C compiler
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise
        _warn(error)
        return None
    return programs


def _require_nvidia() -> None:
    if torch.version.hip is not None:
        raise OSError("they are for NVIDIA GPUs")


def _warn(error: Exception) -> None:
    reason = str(error).strip()[-300:]
    warnings.warn(f"no GPU kernels, slower ones are used: {reason}", RuntimeWarning, stacklevel=4)
