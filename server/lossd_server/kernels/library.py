"""Compiles the C kernels when first wanted, and keeps them on disk for the next process."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path

_UNITS = tuple(Path(__file__).with_name(name) for name in ("focal.c", "rows.c", "paint.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("arithmetic.h", "tasks.h"))

_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno",
          "-fno-trapping-math")  # fmt: skip
_MACHINE_FLAGS = (
    # gcc holds vectors to half their width unless told.
    ("-march=native", "-mprefer-vector-width=512"),
    ("-march=native",),
    (),
)

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
    library.lossd_pairs.restype = ctypes.c_int64
    library.lossd_paint.restype = ctypes.c_int64
    library.lossd_positives.restype = None


@lru_cache(maxsize=1)
def _find_or_compile() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    path = cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()[-300:]
        warnings.warn(f"no compiled kernels, slower ones are used: {reason}", RuntimeWarning, stacklevel=4)
        return None


def _compile(compiler: str | None, path: Path) -> None:
    """Compiles to a file beside the final one, which appears whole or not at all."""
    if compiler is None:
        raise OSError("no C compiler on this machine")
    for flags in _MACHINE_FLAGS:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as draft:
            command = [compiler, *_FLAGS, *flags, *map(str, _UNITS), "-o", draft.name, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)  # noqa: S603
        except subprocess.SubprocessError:
            Path(draft.name).unlink()
            if flags == _MACHINE_FLAGS[-1]:
                raise
            continue
        Path(draft.name).replace(path)
        return


def cache_directory() -> Path:
    """Returns a directory that only this user can write to; a new one where the usual one is not."""
    base = Path(
        os.environ.get("LOSSD_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    )
    directory = base / "lossd"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lossd-"))


def _fingerprint(compiler: str | None) -> str:
    """Returns what a compiled kernel depends on: source, flags, compiler and processor."""
    cpu = Path("/proc/cpuinfo")
    features = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
        if cpu.exists()
        else ""
    )
    parts = (
        *(source.read_text() for source in (*_UNITS, *_HEADERS)),
        str(_FLAGS),
        str(_MACHINE_FLAGS),
        str(compiler),
        platform.machine(),
        features,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
