"""What this process may use, and how it holds on to memory."""

import ctypes
import math
import os
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 2**30

_MEMORY_V2 = Path("/sys/fs/cgroup/memory.max")
_MEMORY_V1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_LIMIT = 1 << 62
"""What version 1 says where there is none is a little below 2⁶³."""

_QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_PERIOD_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def use_granted_cores() -> None:
    """Gives torch as many threads as there are cores for this process, not for the host."""
    torch.set_num_threads(granted_cores())


def granted_cores() -> int:
    """Returns the cores that affinity and the control group grant, at least 1."""
    return max(min(len(os.sched_getaffinity(0)), _quota()), 1)


def granted_memory() -> int | None:
    """Returns the bytes that the control group grants; None where it sets no limit."""
    try:
        limit = int((_MEMORY_V2 if _MEMORY_V2.exists() else _MEMORY_V1).read_text())
    except (OSError, ValueError):  # no control group here, or "max"
        return None
    return limit if limit < _NO_LIMIT else None


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large blocks instead of returning them to the kernel; true if it will.

    A block that comes fresh from the kernel is paid for page by page: for large tensors that was most
    of the time. One arena, because the others give back whatever is larger than 64 MiB. Other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    return all(done) and bool(mallopt(_M_ARENA_MAX, 1))


def _quota() -> int:
    """Returns the cores of the control group's quota, rounded up; many when there is none."""
    try:
        if _QUOTA_V2.exists():
            quota, period = _QUOTA_V2.read_text().split()
        else:
            quota, period = _QUOTA_V1.read_text(), _PERIOD_V1.read_text()
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else 1 << 16
    except (OSError, ValueError):  # no control group here, or "max"
        return 1 << 16
