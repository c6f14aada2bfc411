"""Memory of a GPU that two processes have open: made by one, passed as a descriptor, opened by the other.

By CUDA's driver alone, and so without torch. Neither process can take the memory from the other: it stays
until both have let it go. Linux and NVIDIA GPUs only.
"""

import math
import os
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd.cuda_driver import Driver, GpuMemoryError

__all__ = ["GRANULARITY", "GpuArray", "GpuMemory", "GpuMemoryError", "driver", "ordinal_of", "uuid_of"]

GRANULARITY = 2 << 20
"""Sizes are multiples of this, bytes: the pages of NVIDIA's GPUs."""


@cache
def driver() -> Driver:
    """Returns the driver; raises `GpuMemoryError` where there is none."""
    return Driver()


def uuid_of(ordinal: int) -> str:
    """Returns the UUID of a GPU, 32 hexadecimal digits; empty where its memory cannot be passed on."""
    try:
        return driver().uuids()[ordinal]
    except (GpuMemoryError, IndexError):
        return ""


def ordinal_of(uuid: str) -> int | None:
    """Returns the ordinal of the GPU of that UUID, None where this process sees none such."""
    try:
        uuids = driver().uuids()
    except GpuMemoryError:
        return None
    return uuids.index(uuid) if uuid in uuids else None


class GpuMemory:
    """Memory of a GPU, mapped until this object is gone; its arrays hold it.

    Attributes:
        ordinal: The GPU.
        address: Where it lies, for the GPU.
        size: Bytes.
    """

    def __init__(self, ordinal: int, handle: int, size: int) -> None:
        cuda = driver()
        try:
            if not cuda.is_of(handle, ordinal):
                raise GpuMemoryError(f"it is no memory of GPU {ordinal}")
            self.address = cuda.map(handle, ordinal, size)
        finally:
            cuda.release(handle)
        self.ordinal = ordinal
        self.size = size
        weakref.finalize(self, _unmap, os.getpid(), cuda, ordinal, self.address, size).atexit = False

    def __len__(self) -> int:
        return self.size

    @classmethod
    def create(cls, ordinal: int, size: int) -> tuple["GpuMemory", int]:
        """Returns new memory, and a descriptor of it for another process, to be closed by the caller.

        Raises:
            GpuMemoryError: There is not so much, or the size is no multiple of `GRANULARITY`.
        """
        handle, descriptor = driver().create(ordinal, size)
        try:
            return cls(ordinal, handle, size), descriptor
        except GpuMemoryError:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, ordinal: int, descriptor: int, size: int) -> "GpuMemory":
        """Returns the memory of a descriptor, which stays the caller's to close.

        Raises:
            GpuMemoryError: It is none of this GPU's, or not of this size.
        """
        return cls(ordinal, driver().open(descriptor), size)


def _unmap(process: int, cuda: Driver, *place: int) -> None:
    """Unmaps memory, but not in a child after a fork, where it is the parent's and the driver of no use."""
    if os.getpid() == process:
        cuda.unmap(*place)


class GpuArray:
    """An array in memory of a GPU that is shared: dense, row by row.

    `torch.as_tensor(array, device="cuda")`, `cupy.asarray(array)` and whatever else knows
    `__cuda_array_interface__` read and write it where it lies, and hold it meanwhile. Its numbers are
    for GPUs alone. bfloat16, which that interface has no name for, goes as int16 by `bits`.

    Attributes:
        dtype: numpy's type of the numbers.
        shape: Extents, outermost first.
        memory: What it lies in.
        offset: Where it begins there, bytes.

    Args:
        base: The array that this one is a view of.
    """

    def __init__(
        self,
        memory: GpuMemory,
        offset: int,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        base: "GpuArray | None" = None,
    ) -> None:
        self._base = base  # held: its memory is used again once it is gone
        self.memory = memory
        self.offset = offset
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Its length, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        """Where it begins, for the GPU."""
        return self.memory.address + self.offset

    @property
    def bits(self) -> "GpuArray":
        """The same memory as integers, where each number is one of two bytes."""
        return GpuArray(self.memory, self.offset, self.shape, np.dtype(np.int16), base=self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind not in "iufb":
            raise AttributeError(f"no such interface for {self.dtype.name}: take `bits`")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
        }

    def numpy(self) -> NDArray[Any]:
        """Returns a copy in memory of the host, once the GPU has done what this process told it."""
        array: NDArray[Any] = np.empty(self.shape, self.dtype)
        if self.nbytes:
            driver().synchronize(self.memory.ordinal)
            driver().fetch(self.memory.ordinal, self.address, array.ctypes.data, self.nbytes)
        return array

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"GpuArray(shape={self.shape}, dtype={self.dtype.name}, gpu={self.memory.ordinal})"
