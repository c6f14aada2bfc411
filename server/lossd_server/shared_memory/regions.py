"""Which regions there are, whose they are, and how much they may hold."""

import mmap
import secrets
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

from lossd.gpu_memory import GpuMemory, uuid_of
from lossd.shared_memory import ID_BYTES, Answer
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.shared_memory.mapping import RefusedError, check_descriptor, map_descriptor, map_on_gpu

Mapping = mmap.mmap | GpuMemory
"""The memory of a region."""

MAX_REGIONS_EACH = 64
"""Most regions of one owner."""

MAX_REGIONS = 256
"""Most regions in all: each of the host's costs a descriptor of this process."""


@dataclass(kw_only=True, slots=True, eq=False)
class Owner:
    """Who passed regions: one connection.

    Attributes:
        ids: The regions that it can use.
        held_bytes: What it holds, with what it let go and a computation still uses.
        held_count: How many regions these are.
    """

    ids: set[bytes] = field(default_factory=set)
    held_bytes: int = 0
    held_count: int = 0


class Regions:
    """The regions of all owners, by id. Threads may share it.

    Attributes:
        max_bytes: Most bytes of one owner, and of the slices that one request names: they may lie on
            top of each other, and each is work.
        gpu_uuid: UUID of the GPU whose memory may be passed; empty where none may be.

    Args:
        max_bytes: As above.
        max_total_bytes: Most bytes in all.
        gpu: Ordinal of the GPU whose memory may be passed, as far as it can be; None for none.
    """

    def __init__(self, *, max_bytes: int, max_total_bytes: int, gpu: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self.gpu_uuid = "" if gpu is None else uuid_of(gpu)
        self._gpu = gpu if self.gpu_uuid else None
        self._mappings: dict[bytes, Mapping] = {}
        self._owners: dict[bytes, Owner] = {}
        self._total = Owner()
        # Memory counts until it is unmapped, which may be in any thread and in the middle of any line:
        # what happens there takes no lock.
        self._unmapped: deque[tuple[Owner, int]] = deque()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes that are mapped now."""
        with self._lock:
            self._settle()
            return self._total.held_bytes

    @property
    def count(self) -> int:
        """Regions that can be used now."""
        return len(self._mappings)

    def add(self, owner: Owner, descriptor: int, size: int, *, on_gpu: bool = False) -> bytes:
        """Maps a region and returns its id; the descriptor stays the caller's to close.

        Raises:
            RefusedError: It is not safe to map, or more than its owner or all owners may hold.
        """
        if not on_gpu:
            check_descriptor(descriptor, size)
        elif self._gpu is None:
            raise RefusedError(Answer.NO_GPU)
        with self._lock:
            self._settle()
            self._check_quota(owner, size)
            mapping = self._map(descriptor, size, on_gpu=on_gpu)
            self._count(owner, size, 1)
            weakref.finalize(mapping, self._unmapped.append, (owner, size)).atexit = False
            region_id = secrets.token_bytes(ID_BYTES)
            self._mappings[region_id] = mapping
            self._owners[region_id] = owner
            owner.ids.add(region_id)
        return region_id

    def release(self, owner: Owner, region_id: bytes) -> None:
        """Forgets a region; what computes with it goes on.

        Raises:
            RefusedError: The owner has no such region.
        """
        with self._lock:
            if region_id not in owner.ids:
                raise RefusedError(Answer.UNKNOWN_REGION)
            owner.ids.remove(region_id)
            mapping = self._mappings.pop(region_id, None)
            self._owners.pop(region_id, None)
        if isinstance(mapping, GpuMemory):
            # That may take until the GPU has done what it was told: on a thread that nobody waits for.
            last = threading.Thread(target=_let_go, args=(mapping,), name="lossd-unmap", daemon=True)
            del mapping
            last.start()

    def release_all(self, owner: Owner) -> None:
        """Forgets all regions of an owner."""
        for region_id in list(owner.ids):
            self.release(owner, region_id)

    def find(self, region_id: bytes) -> Mapping:
        """Returns the memory of a region; raises `UNKNOWN_REGION`, and says no more, where there is none."""
        mapping = self._mappings.get(region_id)
        if mapping is None:
            raise unknown_region()
        return mapping

    def owner_of(self, region_id: bytes) -> Owner | None:
        """Returns whose a region is, if there is one of that id."""
        return self._owners.get(region_id)

    def _map(self, descriptor: int, size: int, *, on_gpu: bool) -> Mapping:
        if on_gpu and self._gpu is not None:
            return map_on_gpu(self._gpu, descriptor, size)
        return map_descriptor(descriptor, size)

    def _check_quota(self, owner: Owner, size: int) -> None:
        if owner.held_count >= MAX_REGIONS_EACH or self._total.held_count >= MAX_REGIONS:
            raise RefusedError(Answer.TOO_MANY_REGIONS)
        if owner.held_bytes + size > self.max_bytes:
            raise RefusedError(Answer.TOO_LARGE, self.max_bytes)
        if self._total.held_bytes + size > self._max_total_bytes:
            raise RefusedError(Answer.FULL, self._max_total_bytes)

    def _settle(self) -> None:
        """Takes what was unmapped off the accounts."""
        while self._unmapped:
            owner, size = self._unmapped.popleft()
            self._count(owner, -size, -1)

    def _count(self, owner: Owner, size: int, regions: int) -> None:
        for account in (owner, self._total):
            account.held_bytes += size
            account.held_count += regions


def _let_go(_mapping: Mapping) -> None:
    """Returns, and what it was called with is held no more."""


def unknown_region() -> InvalidInputError:
    """Returns the refusal of an id; it is the same for every id that is not open to the caller."""
    return InvalidInputError(Reason.UNKNOWN_REGION, "no region of that id is open to this caller")
