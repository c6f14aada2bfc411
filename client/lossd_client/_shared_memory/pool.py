"""The regions of one client, cut into arrays and used again."""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lossd.gpu_memory import GpuArray, driver, ordinal_of
from lossd.shared_memory import ALIGNMENT
from lossd_client._arrays import AnyArray
from lossd_client._shared_memory.connection import Connection, NotTakenError
from lossd_client._shared_memory.gpu_region import GpuRegion
from lossd_client._shared_memory.region import Region

AnyRegion = Region | GpuRegion

PAUSE_SECONDS = 1.0
"""After which a server that was missed is looked for again, when its memory is asked for."""

_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """An array in a region, as the server knows it."""

    array: AnyArray
    region_id: bytes
    offset: int


class Pool:
    """Memory shared with one server. Threads may share it; another process may not.

    What a region once held stays mapped, in both processes, until the pool is closed or the server's
    limit is reached: fresh pages cost more than a copy.

    Args:
        path: The socket that takes regions.
        max_bytes: Most bytes that the server takes from one connection.
        gpu_uuid: UUID of the GPU whose memory it takes too; empty for none.

    Attributes:
        max_bytes: As above.
    """

    def __init__(self, path: str, max_bytes: int, gpu_uuid: str = "") -> None:
        self._path = path
        self.max_bytes = max_bytes
        self._gpu_uuid = gpu_uuid
        self._regions: list[AnyRegion] = []
        self._connection: Connection | None = None
        self._next_try = 0.0
        # Arrays die in any thread and in the middle of any line: what happens there takes no lock.
        self._dead: deque[tuple[AnyRegion, int]] = deque()
        self._lock = threading.Lock()
        _pools.add(self)

    @cached_property
    def gpu(self) -> int | None:
        """The GPU that both have, by its ordinal here; asked first by who wants memory of it.

        None for none. A process that has asked CUDA's driver cannot use it in a child after a fork.
        """
        return ordinal_of(self._gpu_uuid) if self._gpu_uuid else None

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any], *, on_gpu: bool = False) -> Slice | None:
        """Returns an array of whatever the memory holds, or None where the server takes no more.

        Args:
            shape: Its shape.
            dtype: Its type.
            on_gpu: Whether it is to lie on the GPU that both have.
        """
        if on_gpu and self.gpu is None:
            return None
        length = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._bury()
            self._notice_end()
            found = self._cut(length, GpuRegion if on_gpu else Region)
            if found is None:
                return None
            region, region_id, offset = found
            array = region.array(offset, shape, dtype)
            weakref.finalize(array, self._dead.append, (region, offset)).atexit = False
            return Slice(array=array, region_id=region_id, offset=offset)

    def find(self, array: AnyArray) -> Slice | None:
        """Returns where an array lies, or None where it does not lie, as a slice can, in a region."""
        address, length = _address_of(array), array.nbytes
        if not isinstance(array, GpuArray) and not array.flags.c_contiguous:
            return None
        with self._lock:
            self._notice_end()
            for region in self._regions:
                offset = address - region.address
                if offset >= 0 and offset + length <= region.size:
                    if region.region_id is None or offset % ALIGNMENT:
                        return None
                    return Slice(array=array, region_id=region.region_id, offset=offset)
        return None

    def retire(self, arrays: Iterable[AnyArray]) -> None:
        """Sees to it that the memory of arrays is not used again: someone may still write to it."""
        addresses = list(map(_address_of, arrays))
        with self._lock:
            for region in self._regions:
                inside = (region.address <= address < region.address + region.size for address in addresses)
                region.is_retired |= any(inside)

    def renew(self, region_ids: Collection[bytes]) -> bool:
        """Passes all regions anew, since the server does not know some that still go by these ids here.

        Returns whether there is a connection.
        """
        with self._lock:
            if any(region.region_id in region_ids for region in self._regions):
                self._disconnect()
            return self._connection is not None or self._connect()

    def wait_for_gpu(self) -> None:
        """Waits until the GPU has done what this process told it: what the server reads is there then."""
        if self.gpu is not None:
            driver().synchronize(self.gpu)

    def close(self) -> None:
        """Ends the connection. Arrays stay what they are; the server no longer has them."""
        with self._lock:
            self._disconnect()
            for region in self._regions:
                region.close()
            self._regions.clear()

    def _cut(self, length: int, kind: type[AnyRegion]) -> tuple[AnyRegion, bytes, int] | None:
        if self._connection is None and not self._connect():
            return None
        for region in self._regions:
            if isinstance(region, kind) and (found := _cut_from(region, length)):
                return found
        fresh = self._new_region(length, kind)
        return None if fresh is None else _cut_from(fresh, length)

    def _new_region(self, length: int, kind: type[AnyRegion]) -> AnyRegion | None:
        """Returns a region with room for a length, or None where the server does not take it."""
        length = max(-(-length // ALIGNMENT), 1) * ALIGNMENT
        if self._room() < length:
            self._release([region for region in self._regions if region.stretches.is_unused])
        room = self._room() // kind.granularity * kind.granularity
        if room < length:
            return None
        region = self._make(kind, min(-(-length // kind.step) * kind.step, room))
        if region is None:
            return None
        if not self._pass(region):
            region.close()
            return None
        self._regions.append(region)
        return region

    def _make(self, kind: type[AnyRegion], size: int) -> AnyRegion | None:
        """Returns a region of a kind, None where there is no memory for it."""
        try:
            return Region(size) if kind is Region or self.gpu is None else GpuRegion(size, self.gpu)
        except OSError:
            return None

    def _room(self) -> int:
        return self.max_bytes - sum(region.size for region in self._regions)

    def _pass(self, region: AnyRegion) -> bool:
        """Passes a region to the server; returns whether the server has it now."""
        if self._connection is None:
            return False
        try:
            region.region_id = self._connection.pass_region(region.descriptor, region.size, region.request)
        except NotTakenError:
            region.region_id = None
        except OSError:
            self._disconnect()
        return region.region_id is not None

    def _release(self, regions: Iterable[AnyRegion]) -> None:
        for region in regions:
            self._regions.remove(region)
            region.close()
            try:
                if self._connection is not None and region.region_id is not None:
                    self._connection.release(region.region_id)
            except NotTakenError:
                continue
            except OSError:
                self._disconnect()

    def _bury(self) -> None:
        """Takes back the memory of arrays that are gone."""
        while self._dead:
            region, offset = self._dead.popleft()
            region.stretches.free(offset)
            if region.is_retired and region.stretches.is_unused and region in self._regions:
                self._release([region])

    def _notice_end(self) -> None:
        """Connects anew where the server has ended the connection, most likely by a restart.

        Where it is not back yet, what there is to pass to it waits for a later call.
        """
        if self._connection is not None and self._connection.has_ended():
            self._disconnect()
            self._next_try = 0.0
        if self._connection is None and self._regions and time.monotonic() >= self._next_try:
            self._connect()
            self._next_try = time.monotonic() + PAUSE_SECONDS

    def _connect(self) -> bool:
        """Connects and passes every region there is; returns whether there is a connection."""
        try:
            self._connection = Connection(self._path)
        except OSError:
            return False
        for region in self._regions:
            self._pass(region)
        return self._connection is not None

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for region in self._regions:
            region.region_id = None

    def _leave_to_parent(self) -> None:
        """Closes, in a child after a fork, what would keep the parent's regions alive beyond the parent."""
        if self._connection is not None:
            self._connection.close()
        for region in self._regions:
            region.close()
        self._regions = []


def _address_of(array: AnyArray) -> int:
    if isinstance(array, GpuArray):
        return array.address
    address: int = array.__array_interface__["data"][0]
    return address


def _cut_from(region: AnyRegion, length: int) -> tuple[AnyRegion, bytes, int] | None:
    if region.region_id is None or region.is_retired:
        return None
    offset = region.stretches.allocate(length)
    return None if offset is None else (region, region.region_id, offset)


def _leave_pools_to_parent() -> None:
    for pool in list(_pools):
        pool._leave_to_parent()  # noqa: SLF001
    _pools.clear()


os.register_at_fork(after_in_child=_leave_pools_to_parent)
