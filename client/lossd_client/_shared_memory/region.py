"""One region: a sealed memory file, mapped, and the stretches of it that are free."""

import fcntl
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from lossd.shared_memory import ALIGNMENT, Request
from lossd_client._arrays import Array
from lossd_client._shared_memory.allocator import Allocator

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Region:
    """A region of this process.

    Attributes:
        size: Bytes.
        address: Where it is mapped.
        descriptor: The memory file.
        stretches: What is free.
        region_id: What the server calls it; None where the server does not have it.
        is_retired: Whether nothing more is cut from it: a call that was given up may still write there.

    Raises:
        OSError: There is no memory, or no descriptor left.
    """

    step = 64 << 20
    """Sizes are multiples of it, where the server's limit allows: pages that nobody touches cost nothing."""
    granularity = ALIGNMENT
    request = Request.PASS

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("lossd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._closing = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self._mapping = mmap.mmap(self.descriptor, size)
        self.address = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self.stretches = Allocator(size)
        self.region_id: bytes | None = None
        self.is_retired = False

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Returns the array that lies at an offset; it keeps the memory mapped."""
        return np.ndarray(shape, dtype, buffer=self._mapping, offset=offset)

    def close(self) -> None:
        """Closes the descriptor, as the end of this object does; the memory goes with the last array."""
        self._closing()
