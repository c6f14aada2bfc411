"""Host memory for gradients, used again as soon as nobody holds it."""

import mmap
import threading
import weakref
from collections import OrderedDict

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
        max_idle_bytes: Most memory kept for later; beyond it, what was idle longest is let go.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: OrderedDict[int, mmap.mmap] = OrderedDict()  # by address of the object, oldest first
        # Memory comes back whenever a reference is dropped: also while this thread holds the lock.
        self._lock = threading.RLock()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for later."""
        with self._lock:
            return sum(map(len, self._idle.values()))

    def allocate(self, size: int) -> Tensor:
        """Returns `size` bytes as a uint8 tensor."""
        if size < _SMALLEST:
            return torch.empty(size, dtype=torch.uint8)
        block = self._take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
        array = np.frombuffer(block, np.uint8, size)
        weakref.finalize(array, self._give_back, block).atexit = False
        return torch.from_numpy(array)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for key in reversed(self._idle):
                if len(self._idle[key]) == size:
                    return self._idle.pop(key)
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._idle[id(block)] = block
            while self.idle_bytes > self._max_idle_bytes:
                self._idle.popitem(last=False)
