"""One core for the threads of small calls.

Python lets one thread run at a time. On several cores a change of threads wakes one up on another core,
which takes long, and there the counts of references are in the caches of the core before. On one core
both are cheap. Work that more cores are good for is done away from home.
"""

import os
import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

LARGE_BYTES = 128 << 10
"""Work on so many bytes and more is worth the way."""

_AT_HOME = nullcontext()

_CALLER = 0
"""What the system calls the thread that asks."""

_LOOK_SECONDS = 2.0
_CROWDED, _IDLE = 0.3, 0.5
"""Shares of a core's time: what others have of a home that is worth leaving, and what is free of the next."""

_STATISTICS = Path("/proc/stat")
_STATISTICS_BYTES = 64 << 10
"""What is read of it: the lines of the cores come first."""
_IDLE_FIELDS = slice(4, 6)
"""Of a core's line there: ticks that it was idle, or waited for a disk."""


class Home:
    """The core that threads share, until other processes are found on it.

    Args:
        cores: The cores to choose from; where there are not two, as by default, nothing is done at all.
    """

    def __init__(self, cores: Collection[int] = ()) -> None:
        self._cores = frozenset(cores)
        self._is_chosen = len(self._cores) > 1
        self._random = random.Random()  # noqa: S311
        self._core = self._random.choice(sorted(self._cores) or [0])
        self._here = threading.local()
        self._lock = threading.Lock()
        self._members: set[int] = set()
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    @classmethod
    def of_this_process(cls) -> "Home":
        """Returns one of the cores that this process may use; a system that cannot say has none."""
        return cls(os.sched_getaffinity(_CALLER) if hasattr(os, "sched_getaffinity") else ())

    def settle(self) -> None:
        """Keeps the calling thread at home from now on."""
        if self._is_chosen:
            self._here.is_home = True
            self._arrive(threading.get_native_id())

    @contextmanager
    def of_new_threads(self) -> Iterator[None]:
        """Keeps the threads that are made in a block at home; the one that makes them stays free."""
        if not self._is_chosen:
            yield
            return
        known = set(threading.enumerate())
        _keep(_CALLER, {self._core})
        try:
            yield
        finally:
            _keep(_CALLER, self._cores)
            made = (thread.native_id for thread in threading.enumerate() if thread not in known)
            for thread in filter(None, made):
                if _cores_of(thread) == {self._core}:  # else somebody else made it
                    self._arrive(thread)

    def away(self, size: int = LARGE_BYTES) -> AbstractContextManager[None]:
        """Lets the calling thread, and those that it makes, use every core until the block ends.

        Args:
            size: Bytes that are worked on; few are worked on at home.
        """
        if size < LARGE_BYTES or not getattr(self._here, "is_home", False):
            return _AT_HOME
        return self._away()

    @contextmanager
    def _away(self) -> Iterator[None]:
        thread = threading.get_native_id()
        self._here.is_home = False
        with self._lock:
            self._members.discard(thread)
            _keep(thread, self._cores)
        try:
            yield
        finally:
            self._here.is_home = True
            self._arrive(thread)

    def leave(self) -> None:
        """Lets the calling thread use every core from now on, whoever made it."""
        if self._is_chosen:
            _keep(_CALLER, self._cores)

    def watch(self) -> None:
        """Moves from time to time, where other processes want this core while another is idle."""
        if self._is_chosen and _STATISTICS.exists():
            self._watch = threading.Thread(target=self._look, name="lossd-home", daemon=True)
            self._watch.start()

    def close(self) -> None:
        """Moves no more."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()

    def move(self, core: int) -> None:
        """Makes another core home, for everyone who is not away."""
        with self._lock:
            self._core = core
            for thread in self._members:
                _keep(thread, {core})

    def _arrive(self, thread: int) -> None:
        with self._lock:
            _keep(thread, {self._core})
            self._members.add(thread)

    def _look(self) -> None:
        with _STATISTICS.open("rb", buffering=0) as statistics:
            before = _Usage.read(statistics)
            while not self._closed.wait(_LOOK_SECONDS):
                now = _Usage.read(statistics)
                better = find_better(self._core, *now.since(before, self._cores))
                # Two servers that meet on a core had better not leave it together.
                if better is not None and self._random.random() < 0.5:
                    self.move(better)
                before = now


@dataclass(frozen=True, kw_only=True, slots=True)
class _Usage:
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


def _keep(thread: int, cores: Collection[int]) -> None:
    """Keeps a thread on some cores, where the system lets us and the thread has not ended."""
    with suppress(OSError):
        os.sched_setaffinity(thread, cores)


def _cores_of(thread: int) -> AbstractSet[int]:
    """Returns the cores that a thread may use; none where that is not to be known."""
    try:
        return os.sched_getaffinity(thread)
    except OSError:
        return set()
