"""From a descriptor that a stranger sent to memory that is safe to touch."""

import fcntl
import mmap
import os

from lossd.gpu_memory import GRANULARITY, GpuMemory, GpuMemoryError
from lossd.shared_memory import Answer

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""The size of a region is fixed for good: touching what was cut off would end this process by SIGBUS."""


class RefusedError(Exception):
    """A region that is not taken.

    Attributes:
        answer: Why.
        limit: The limit it would break, bytes, where it is about one.
    """

    def __init__(self, answer: Answer, limit: int = 0) -> None:
        super().__init__(answer.name)
        self.answer = answer
        self.limit = limit


def check_descriptor(descriptor: int, size: int) -> None:
    """Raises `RefusedError` unless it is a sealed memory file of this size, in ordinary pages."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:  # a socket, a directory, a file on a disk
        raise RefusedError(Answer.NOT_SEALED) from error
    if seals & SEALS != SEALS:
        raise RefusedError(Answer.NOT_SEALED)
    if size <= 0 or os.fstat(descriptor).st_size != size:
        raise RefusedError(Answer.WRONG_SIZE)
    # Huge pages come from a pool that can be empty when they are touched, which is a SIGBUS as well.
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        raise RefusedError(Answer.NOT_MAPPABLE)


def map_descriptor(descriptor: int, size: int) -> mmap.mmap:
    """Returns the memory of a checked descriptor, shared; raises `RefusedError` where it cannot be had.

    It stays mapped until the last array of it is gone. Never close it: that is for the collector.
    """
    try:
        return mmap.mmap(descriptor, size)
    except (OSError, ValueError, OverflowError) as error:  # read-only, sealed against writing, no room
        raise RefusedError(Answer.NOT_MAPPABLE) from error


def map_on_gpu(ordinal: int, descriptor: int, size: int) -> GpuMemory:
    """Returns the memory of a GPU that a descriptor is of; raises `RefusedError` where it is no such memory.

    The driver tells whose it is, and maps all of it or none. It stays mapped until its last array is gone.
    """
    if size <= 0 or size % GRANULARITY:
        raise RefusedError(Answer.WRONG_SIZE)
    try:
        return GpuMemory.open(ordinal, descriptor, size)
    except GpuMemoryError as error:
        raise RefusedError(Answer.NOT_MAPPABLE) from error
