"""A stand-in for CUDA's driver: memory files in place of a GPU's memory, mapped where anyone can look."""

import ctypes
import itertools
import mmap
import os
from pathlib import Path

import numpy as np
import torch

from lossd.gpu_memory import GpuArray, GpuMemoryError

UUID = "00" * 15 + "07"
"""Of the one GPU that there is."""


class StandIn:
    """One GPU, number 0; counts what is mapped and what was waited for."""

    def __init__(self):
        self.mapped: dict[int, mmap.mmap] = {}
        self.waits = 0
        self._numbers = itertools.count(1)
        self._handles: dict[int, int] = {}

    def uuids(self):
        return [UUID]

    def create(self, _ordinal, size):
        descriptor = os.memfd_create("gpu")
        os.ftruncate(descriptor, size)
        return self.open(descriptor), descriptor

    def open(self, descriptor):
        try:
            is_memory = str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/memfd:gpu")
        except OSError:
            is_memory = False
        if not is_memory:
            raise GpuMemoryError(999, "cuMemImportFromShareableHandle: unknown error")
        number = next(self._numbers)
        self._handles[number] = os.dup(descriptor)
        return number

    def is_of(self, handle, ordinal):
        return ordinal == 0 and handle in self._handles

    def map(self, handle, _ordinal, size):
        descriptor = self._handles[handle]
        if os.fstat(descriptor).st_size != size:
            raise GpuMemoryError(801, "cuMemMap: operation not supported")
        mapping = mmap.mmap(descriptor, size)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        self.mapped[address] = mapping
        return address

    def unmap(self, _ordinal, address, _size):
        del self.mapped[address]

    def release(self, handle):
        os.close(self._handles.pop(handle))

    def synchronize(self, _ordinal):
        self.waits += 1

    def fetch(self, _ordinal, address, to, size):
        ctypes.memmove(to, address, size)


def numbers_of(array: GpuArray) -> np.ndarray:
    """The array's memory, which lies on the host after all."""
    memory = (ctypes.c_char * array.nbytes).from_address(array.address)
    memory.owner = array.memory
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def tensor_of(array: GpuArray) -> torch.Tensor:
    """The same as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(numbers_of(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(numbers_of(array))
