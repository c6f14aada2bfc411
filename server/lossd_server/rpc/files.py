"""Files that are read anew when they change."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lossd_server.errors import ConfigurationError, Reason


class _Signature(NamedTuple):
    modified_ns: int
    inode: int
    size: int


class WatchedFiles:
    """Some files that belong together, and whether they are still those that were read.

    Whether a file changed is read off its signature and not heard from the system: a volume of Kubernetes
    changes by a link to another directory, which a watch on the file does not see.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [Path(path) for path in paths]
        self._seen: list[_Signature | None] = []

    def have_changed(self) -> bool:
        """Returns whether a file is another than the last time that this was asked."""
        # Taken before the files are read, so that what changes meanwhile counts the next time.
        now = [_signature(path) for path in self._paths]
        changed, self._seen = now != self._seen, now
        return changed


def read_file(field: str, path: str) -> bytes:
    """Returns what is in a file.

    Args:
        field: The setting that names it.
        path: Where it is.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unusable(field, path, f"cannot read {path}: {error.strerror}") from error


def unusable(field: str, path: str, message: str) -> ConfigurationError:
    """Returns the error of a file that cannot be used."""
    return ConfigurationError(Reason.INVALID_OPTION, message, field=field, path=path)


def _signature(path: Path) -> _Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Signature(found.st_mtime_ns, found.st_ino, found.st_size)
