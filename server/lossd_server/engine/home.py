"""One core for the threads of small calls.

Python lets one thread run at a time. On several cores a change of threads wakes one up on another core,
which takes long, and there the counts of references are in the caches of the core before. On one core
both are cheap. Work that more cores are good for is done away from home.

There a thread that wakes another would lose the core to it at once, and have it back when that finds Python's
lock taken: so a call changes threads far more often than it need. Therefore those at home are patient: they
are run as batches are (`SCHED_BATCH`), when whoever has the core waits. That is no good where others keep the
core busy, who do not wait, such as our own large evaluations: then they are run as any other.
"""

import os
import random
import threading
import time
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from lossd_server.engine.core_usage import STATISTICS, Usage, find_better, is_full, thread_seconds

LARGE_BYTES = 128 << 10
"""Work on so many bytes and more is worth the way."""

_PATIENT: int | None = getattr(os, "SCHED_BATCH", None)
"""The policy of patient threads, where the system has it."""

_AT_HOME = nullcontext()

_CALLER = 0
"""What the system calls the thread that asks."""

_LOOK_SECONDS = 2.0


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
        self._settled: set[int] = set()  # those who are away too
        self._away_seconds = 0.0  # of processors
        self._is_patient = _has_usual_policy()
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
        thread, began = threading.get_native_id(), time.thread_time()
        self._here.is_home = False
        with self._lock:
            self._members.discard(thread)
            _keep(thread, self._cores)
            _schedule(thread, is_patient=False)
        try:
            yield
        finally:
            self._here.is_home = True
            self._arrive(thread)
            with self._lock:
                self._away_seconds += time.thread_time() - began

    def leave(self) -> None:
        """Lets the calling thread use every core from now on, whoever made it."""
        if self._is_chosen:
            _keep(_CALLER, self._cores)
            _schedule(_CALLER, is_patient=False)

    def watch(self) -> None:
        """Looks from time to time whether other processes want this core.

        Then it moves, where another core is idle. As long as it stays where they keep the core busy, nobody
        is patient.
        """
        if self._is_chosen and STATISTICS.exists():
            self._watch = threading.Thread(target=self._look, name="lossd-home", daemon=True)
            self._watch.start()

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()
        if self._watch is not None:
            self._watch.join()

    def move(self, core: int) -> None:
        """Makes another core home, for everyone who is not away."""
        with self._lock:
            self._core = core
            for thread in self._members:
                _keep(thread, {core})

    def be_patient(self, *, is_patient: bool) -> None:
        """Says whether those who are not away are to wait for each other, and for everyone else.

        Nobody ever is where the operator gave the process a policy.
        """
        with self._lock:
            if is_patient != self._is_patient and _has_usual_policy():
                self._is_patient = is_patient
                for thread in self._members:
                    _schedule(thread, is_patient=is_patient)

    def _arrive(self, thread: int) -> None:
        with self._lock:
            _keep(thread, {self._core})
            _schedule(thread, is_patient=self._is_patient)
            self._members.add(thread)
            self._settled.add(thread)

    def _seconds_at_home(self) -> float:
        """Returns how long threads were at work at home; less where one ended, or the system does not say."""
        with self._lock:
            threads, away = list(self._settled), self._away_seconds
        return sum(map(thread_seconds, threads)) - away

    def _look(self) -> None:
        with STATISTICS.open("rb", buffering=0) as statistics:
            before, ours_before = Usage.read(statistics), self._seconds_at_home()
            while not self._closed.wait(_LOOK_SECONDS):
                now, ours = Usage.read(statistics), self._seconds_at_home()
                free, own = now.since(before, self._cores)
                better = find_better(self._core, free, own)
                is_patient = not is_full(self._core, free, (ours - ours_before) / (now.at - before.at))
                # Two servers that meet on a core had better not leave it together.
                if better is not None and self._random.random() < 0.5:
                    self.move(better)
                    is_patient = True
                self.be_patient(is_patient=is_patient)
                before, ours_before = now, ours


def _keep(thread: int, cores: Collection[int]) -> None:
    """Keeps a thread on some cores, where the system lets us and the thread has not ended."""
    with suppress(OSError):
        os.sched_setaffinity(thread, cores)


def _has_usual_policy() -> bool:
    """Whether this process has the policy of all that nobody gave another; its first thread keeps it."""
    try:
        return _PATIENT is not None and os.sched_getscheduler(os.getpid()) == os.SCHED_OTHER
    except OSError:
        return False


def _schedule(thread: int, *, is_patient: bool) -> None:
    """Has a thread wait for whoever runs, or not, where the system lets us and the thread has not ended."""
    if _PATIENT is not None and _has_usual_policy():
        with suppress(OSError):
            os.sched_setscheduler(thread, _PATIENT if is_patient else os.SCHED_OTHER, os.sched_param(0))


def _cores_of(thread: int) -> AbstractSet[int]:
    """Returns the cores that a thread may use; none where that is not to be known."""
    try:
        return os.sched_getaffinity(thread)
    except OSError:
        return set()
