"""Whether a client shares memory with its server, and the memory."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossd.gpu_memory import GpuArray
from lossd_client._arrays import Array
from lossd_client._results import ServerInfo

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool


class Sharing:
    """The shared memory of one client, of its own in every process.

    Attributes:
        is_wanted: Whether its user wants any.
        is_possible: Whether there can be any: the server listens on this host, and nobody is against it.
        is_known: Whether the server was asked.

    Args:
        target: Where the server listens.
        wanted: Whether its user wants any.
    """

    def __init__(self, target: str, *, wanted: bool) -> None:
        self.is_wanted = wanted
        self.is_possible = wanted and target.startswith("unix:") and sys.platform == "linux"
        self.is_known = False
        self._directory = Path(target.removeprefix("unix:").removeprefix("//")).parent
        self._path = ""
        self._max_bytes = 0
        self._gpu = ""
        self._pools: dict[int, Pool] = {}

    def learn(self, info: ServerInfo) -> None:
        """Takes in what the server says of itself."""
        self.is_known = True
        self._max_bytes = info.max_shared_bytes
        self._gpu = info.shared_gpu
        self._path = info.shared_memory_socket
        if self._path and not Path(self._path).exists():
            # The server may know the directory that both sockets are in by another name.
            self._path = str(self._directory / Path(self._path).name)

    def pool(self) -> "Pool | None":
        """Returns this process's memory, or None where the server shares none."""
        if not self._path:
            return None
        process = os.getpid()
        if process not in self._pools:
            from lossd_client._shared_memory.pool import Pool  # noqa: PLC0415

            # A parent's memory is the parent's; of two threads here, one is first.
            made = Pool(self._path, self._max_bytes, self._gpu)
            self._pools = {process: self._pools.setdefault(process, made)}
        return self._pools[process]

    def close(self) -> None:
        """Gives this process's memory up; a later call shares other memory."""
        pool = self._pools.pop(os.getpid(), None)
        if pool is not None:
            pool.close()


def allocated(pool: "Pool | None", shape: int | Sequence[int], dtype: Any) -> Array:
    """Returns an array, its numbers not set: in shared memory, or an ordinary one where there is none."""
    dtype = np.dtype(dtype)
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    can_be_shared = pool is not None and not dtype.hasobject and min(extents, default=0) >= 0
    place = pool.allocate(extents, dtype) if pool is not None and can_be_shared else None
    return (
        place.array if place is not None and isinstance(place.array, np.ndarray) else np.empty(extents, dtype)
    )


def allocated_on_gpu(
    pool: "Pool | None", shape: int | Sequence[int], dtype: Any, gpu: int | None
) -> GpuArray | None:
    """Returns an array on the GPU that the server shares memory of.

    None where it shares none, or that is another GPU than `gpu`.
    """
    dtype = np.dtype(dtype)
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    if dtype.hasobject or min(extents, default=0) < 0:
        raise ValueError(f"there is no array of {dtype} {list(extents)} on a GPU")
    if pool is None or gpu not in {None, pool.gpu}:
        return None
    place = pool.allocate(extents, dtype, on_gpu=True)
    return place.array if place is not None and isinstance(place.array, GpuArray) else None
