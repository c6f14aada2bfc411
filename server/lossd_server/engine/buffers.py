"""Host memory for gradients, used again as soon as nobody holds it."""

import contextlib
import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 20
"""Bytes below which the allocator of the C library is as good."""

_HUGE_PAGE = 2 << 20
"""Sizes are rounded up to whole pages of this size: fewer pages, and more requests that want the same."""


class BufferPool:
    """Hands out uninitialised memory, and takes it back when its last tensor, array or view is gone.

    Memory that comes fresh from the kernel is paid for page by page, which takes longer than writing a
    gradient to it does. Threads may share one.

    Args:
        max_idle_bytes: Most memory kept for later; beyond it, what was idle longest is let go at the
            next call.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[mmap.mmap] = []  # the longest idle first
        # Memory comes back whenever a reference is dropped, in any thread and in the middle of any line:
        # what happens there takes no lock.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for later."""
        with self._lock:
            self._settle()
            return sum(map(len, self._idle))

    def let_go(self) -> None:
        """Gives idle memory back to the kernel."""
        with self._lock:
            self._settle()
            self._idle.clear()

    def allocate(self, size: int) -> Tensor | None:
        """Returns `size` bytes as a uint8 tensor; None where these are few.

        Raises:
            MemoryError: There are not so many.
        """
        if size < _SMALLEST:
            return None
        block = self._take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
        array = np.frombuffer(block, np.uint8, size)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return torch.from_numpy(array)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            self._settle()
            for place in reversed(range(len(self._idle))):
                if len(self._idle[place]) == size:
                    return self._idle.pop(place)
        return _new_block(size)

    def _settle(self) -> None:
        """Keeps what came back, as far as there is room."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        while sum(map(len, self._idle)) > self._max_idle_bytes:
            del self._idle[0]


def _new_block(size: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
