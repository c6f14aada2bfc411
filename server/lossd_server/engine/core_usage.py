"""How much of each core is used, and by whom."""

import os
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

STATISTICS = Path("/proc/stat")
_STATISTICS_BYTES = 64 << 10
"""What is read of it: the lines of the cores come first."""
_IDLE_FIELDS = slice(4, 6)
"""Of a core's line there: ticks that it was idle, or waited for a disk."""

_CROWDED, _IDLE = 0.3, 0.5
"""Shares of a core's time: what others have of one that is worth leaving, and what is free of the next."""
_FULL = 0.05
"""What is free of a core that others keep busy whatever we do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What was used of the cores since the system, and the process, began.

    Attributes:
        at: When, in seconds.
        own: Seconds of this process, on whatever core.
        idle: Seconds in which each core was idle.
    """

    at: float
    own: float
    idle: Mapping[int, float]

    @classmethod
    def read(cls, statistics: FileIO) -> Self:
        """Returns what the system's statistics say now."""
        statistics.seek(0)
        *lines, _ = map(bytes.split, statistics.read(_STATISTICS_BYTES).split(b"\n"))  # the last may be cut
        tick = os.sysconf("SC_CLK_TCK")
        idle = {
            int(fields[0].removeprefix(b"cpu")): sum(map(int, fields[_IDLE_FIELDS])) / tick
            for fields in lines
            if fields and fields[0].startswith(b"cpu") and fields[0] != b"cpu"
        }
        return cls(at=time.monotonic(), own=time.process_time(), idle=idle)

    def since(self, before: Self, cores: AbstractSet[int]) -> tuple[dict[int, float], float]:
        """Returns the share of each core's time in which it was idle, and what we used as a share of one."""
        seconds = self.at - before.at
        known = cores & self.idle.keys() & before.idle.keys()
        free = {core: (self.idle[core] - before.idle[core]) / seconds for core in known}
        return free, (self.own - before.own) / seconds


def is_full(core: int, free: Mapping[int, float], ours: float) -> bool:
    """Whether others have much of a core that is hardly ever idle: they do not wait, as those do who call us.

    Args:
        core: The core.
        free: The share of each core's time in which it was idle.
        ours: The share that those had who ask; others are also other threads of this process.
    """
    idle = free.get(core, 1)
    return idle < _FULL and 1 - idle - ours > _CROWDED


def find_better(core: int, free: Mapping[int, float], own: float) -> int | None:
    """Returns the core to move to from one that others want; None where it is as good as any.

    Args:
        core: Where we are.
        free: The share of each core's time in which it was idle.
        own: What we used, on whatever core, as a share of one.
    """
    others = 1 - free.get(core, 1) - own
    best = max(free, key=free.__getitem__, default=core)
    return best if others > _CROWDED and free[best] > _IDLE else None


def thread_seconds(thread: int) -> float:
    """Returns how long a thread of this process was at work; 0 where it ended, or the system does not say."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_bytes().split()[0]) / 1e9
    except OSError:
        return 0.0
