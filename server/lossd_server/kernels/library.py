"""Finds the C kernels: installed with the system's libraries, or compiled when first wanted and kept."""

import ctypes
import os
import subprocess
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path

from lossd_server.kernels.compiler import cached_name, compile_library, find_compiler, installed_name

_lock = threading.Lock()
_loaded: list[ctypes.CDLL] = []


def loaded_library() -> ctypes.CDLL | None:
    """Returns the kernels if they are loaded; never compiles."""
    return _loaded[0] if _loaded else None


def load_library() -> ctypes.CDLL | None:
    """Returns the kernels, compiled now if need be; None, and one `RuntimeWarning`, where that fails."""
    with _lock:
        if not _loaded and (library := _find_or_compile()) is not None:
            _declare(library)
            _loaded.append(library)
    return loaded_library()


def _declare(library: ctypes.CDLL) -> None:
    """Says what goes in where that is passed bare, and what comes back where that is not an int."""
    library.lossd_count_objects.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64)
    library.lossd_count_objects.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.lossd_focal.argtypes = (pointer, number, pointer, number, pointer)
    library.lossd_rows.argtypes = (pointer, number, number, number, pointer)
    library.lossd_paint.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.lossd_paint.restype = ctypes.c_int64
    library.lossd_read_objects.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
    )
    library.lossd_positives.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.lossd_positives.restype = None


@lru_cache(maxsize=1)
def _find_or_compile() -> ctypes.CDLL | None:
    try:
        return _find_installed() or ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()[-300:]
        warnings.warn(f"no compiled kernels, slower ones are used: {reason}", RuntimeWarning, stacklevel=4)
        return None


def _find_installed() -> ctypes.CDLL | None:
    """Returns kernels that the dynamic loader finds: it knows which of several the processor can run."""
    try:
        return ctypes.CDLL(installed_name())
    except OSError:
        return None


def _compiled() -> Path:
    """Returns the library in the cache, put there if need be."""
    compiler = find_compiler()
    path = cache_directory() / cached_name(compiler)
    if not path.exists():
        compile_library(compiler, path)
    return path


def cache_directory() -> Path:
    """Returns a directory that only this user can write to; a new one where the usual one is not.

    Raises:
        OSError: Nothing at all can be written to.
    """
    try:
        directory = _usual_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # the latter for a user who has no home
        pass
    return Path(tempfile.mkdtemp(prefix="lossd-"))


def _usual_directory() -> Path:
    base = os.environ.get("LOSSD_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lossd"
