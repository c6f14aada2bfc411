"""Host memory for gradients, used again as soon as nobody holds it."""

import contextlib
import mmap
import sys
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 20
"""Bytes below which the allocator of the C library is as good."""

_HUGE_PAGE = 2 << 20
"""Sizes are rounded up to whole pages of this size: fewer pages, and more requests that want the same."""

Bytes = NDArray[np.uint8]


def _references(blocks: Sequence[object], place: int) -> int:
    """Returns how many references there are to an entry."""
    return sys.getrefcount(blocks[place])


_OWN_REFERENCES = _references([object()], 0)
"""To an entry that nobody else refers to."""


class BufferPool:
    """Hands out uninitialised memory, again when its last array, tensor or view is gone.

    Memory that comes fresh from the kernel is paid for page by page, which takes longer than writing a
    gradient to it does. All that is handed out refers to its block, so that a block is idle when nobody
    else does: nothing has to be done when a reference is dropped, in whichever thread that is. Threads may
    share one, under an interpreter with a global lock, which the count of references is exact under.

    Args:
        max_idle_bytes: Most memory kept for later; beyond it, what was handed out longest ago is let go at
            the next call.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._blocks: list[Bytes] = []  # what was handed out longest ago comes first
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for later."""
        with self._lock:
            self._keep(self._max_idle_bytes)
            return sum(len(self._blocks[place]) for place in self._idle_places())

    def let_go(self) -> None:
        """Gives idle memory back to the kernel."""
        with self._lock:
            self._keep(0)

    def allocate(self, size: int) -> Bytes | None:
        """Returns an array of so many bytes; None where these are few.

        Raises:
            MemoryError: There are not so many.
        """
        if size < _SMALLEST:
            return None
        with self._lock:
            block = self._take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
            self._keep(self._max_idle_bytes)
            self._blocks.append(block)
        return block[:size]

    def _take(self, size: int) -> Bytes:
        """Returns the idle block of a size that was handed out last, or a new one."""
        for place in reversed(self._idle_places()):
            if len(self._blocks[place]) == size:
                return self._blocks.pop(place)
        return _new_block(size)

    def _keep(self, most: int) -> None:
        """Lets idle blocks go until at most so many bytes of them are left."""
        kept = 0
        for place in reversed(self._idle_places()):
            kept += len(self._blocks[place])
            if kept > most:
                del self._blocks[place]

    def _idle_places(self) -> list[int]:
        """Returns where the blocks stand that nobody else refers to."""
        blocks = self._blocks
        return [place for place in range(len(blocks)) if _references(blocks, place) == _OWN_REFERENCES]


def _new_block(size: int) -> Bytes:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8)
