"""Compiles the C kernels: for this processor, or ahead of time for levels of its architecture."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_UNITS = tuple(Path(__file__).with_name(name) for name in ("focal.c", "rows.c", "paint.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("arithmetic.h", "paint_boxes.h", "tasks.h"))

_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off",
          "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
_WIDEST = "-mprefer-vector-width=512"
"""gcc holds vectors to half their width unless told."""

_NATIVE_FLAGS = (("-march=native", _WIDEST), ("-march=native",), ())

_LEVELS = {
    "x86_64": {
        "glibc-hwcaps/x86-64-v4": ("-march=x86-64-v4", _WIDEST),
        "glibc-hwcaps/x86-64-v3": ("-march=x86-64-v3",),
    }
}
"""Directories that glibc's loader looks into first, on processors that can run what is there.

None for those without fused multiplication and addition: done in software, it is slower than torch is.
"""

_ONE_LEVEL: dict[str, tuple[str, ...]] = {".": ()}


def compile_for_levels(directory: Path) -> list[Path]:
    """Compiles a library for every level of this machine's architecture.

    Below a directory of the dynamic loader, `installed_name` finds the best one for the processor.

    Raises:
        OSError: There is no C compiler, or the directory cannot be written to.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler = find_compiler()
    made = []
    for level, flags in _LEVELS.get(platform.machine(), _ONE_LEVEL).items():
        path = directory / level / installed_name()
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_library(compiler, path, [flags])
        path.chmod(0o755)
        made.append(path)
    return made


def compile_library(
    compiler: str | None, path: Path, choices: Sequence[tuple[str, ...]] = _NATIVE_FLAGS
) -> None:
    """Compiles to a file beside the final one, which appears whole or not at all.

    Args:
        compiler: The C compiler.
        path: The library to make.
        choices: Flags to try, the first that the compiler takes being used.

    Raises:
        OSError: There is no C compiler, or the directory cannot be written to.
        subprocess.SubprocessError: The compiler failed with each choice.
    """
    if compiler is None:
        raise OSError("no C compiler on this machine")
    for flags in choices:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as draft:
            command = [compiler, *_FLAGS, *flags, *map(str, _UNITS), "-o", draft.name, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)  # noqa: S603
        except subprocess.SubprocessError:
            Path(draft.name).unlink(missing_ok=True)  # a linker may have done so
            if flags == choices[-1]:
                raise
            continue
        Path(draft.name).replace(path)
        return


def find_compiler() -> str | None:
    """Returns the machine's C compiler, `$CC` first."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def installed_name() -> str:
    """Returns what kernels compiled ahead of time are called: of this very source, or not found at all."""
    return f"liblossd-kernels-{_digest(*_source())}.so"


def cached_name(compiler: str | None) -> str:
    """Returns what kernels compiled here are called: of this source, compiler and processor."""
    cpu = Path("/proc/cpuinfo")
    features = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "")
        if cpu.exists()
        else ""
    )
    parts = (*_source(), str(_NATIVE_FLAGS), str(compiler), platform.machine(), features)
    return f"kernels-{_digest(*parts)}.so"


def _source() -> list[str]:
    return [*(source.read_text() for source in (*_UNITS, *_HEADERS)), str(_FLAGS)]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
