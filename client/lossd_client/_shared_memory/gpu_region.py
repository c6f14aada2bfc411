"""One region of a GPU's memory, and the stretches of it that are free."""

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from lossd.gpu_memory import GRANULARITY, GpuArray, GpuMemory
from lossd.shared_memory import Request
from lossd_client._shared_memory.allocator import Allocator


class GpuRegion:
    """A region of this process, as `Region`.

    Attributes:
        size: Bytes.
        address: Where it lies, for the GPU.
        descriptor: What the server opens it by.
        stretches: What is free.
        region_id: What the server calls it; None where the server does not have it.
        is_retired: Whether nothing more is cut from it: a call that was given up may still write there.

    Raises:
        OSError: The GPU has not so much memory, or cannot pass it on.
    """

    step = 8 << 20
    """Less than of the host's memory, since a GPU's is taken at once; regions are few, and so not exact."""
    granularity = GRANULARITY
    request = Request.PASS_GPU

    def __init__(self, size: int, gpu: int) -> None:
        self.size = size
        self._memory, self.descriptor = GpuMemory.create(gpu, size)
        self._closing = weakref.finalize(self, os.close, self.descriptor)
        self.address = self._memory.address
        self.stretches = Allocator(size)
        self.region_id: bytes | None = None
        self.is_retired = False

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> GpuArray:
        """Returns the array that lies at an offset; it keeps the memory mapped."""
        return GpuArray(self._memory, offset, shape, dtype)

    def close(self) -> None:
        """Closes the descriptor, as the end of this object does; the memory goes with the last array."""
        self._closing()
