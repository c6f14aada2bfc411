"""Whose turn at the host's cores it is."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lossd_server.engine.asker import Asker
from lossd_server.engine.calling import LOOK_SECONDS, Waiting
from lossd_server.engine.home import Home
from lossd_server.engine.queue import FairQueue


class Cores:
    """Turns at the host's cores: as many at a time as there are, shared fairly between flows.

    Were all who ask at work at a time, each would be slow, and the thread that takes calls in, to answer or
    to refuse them, would be one among hundreds that want a core.

    Args:
        count: How many there are.
        cheap: What costs no more does not wait: two changes of threads would take longer than it does.
        home: The core of those who have not got one of these.
    """

    def __init__(self, count: int, cheap: int = 0, home: Home | None = None) -> None:
        self._free = count
        self._cheap = cheap
        self._home = home or Home()
        self._mutex = threading.Lock()
        self._queue: FairQueue[Waiting] = FairQueue()

    @property
    def waiting_count(self) -> int:
        """How many wait for a core."""
        return len(self._queue)

    def turn(self, asker: Asker, cost: int) -> AbstractContextManager[None]:
        """Waits for a core, where the work is not cheap, and has it until the block ends.

        Args:
            asker: For whom.
            cost: What the work costs beside other work, at least 1.

        Raises:
            DeadlineError: The deadline passed before.
            CallerGoneError: Nobody waits for the answer any more.
        """
        return nullcontext() if cost <= self._cheap else self._turn(asker, cost)

    @contextmanager
    def _turn(self, asker: Asker, cost: int) -> Iterator[None]:
        entry = self._enter(asker, cost)
        if entry is not None:
            self._await_call(entry, asker)
        try:
            with self._home.away():
                yield
        finally:
            self._leave(entry)

    def _enter(self, asker: Asker, cost: int) -> Waiting | None:
        """Takes a free core, or an entry in the queue."""
        with self._mutex:
            if self._free:
                self._free -= 1
                return None
            entry = Waiting(flow=asker.flow, costs=[cost])
            self._queue.join(entry)
            return entry

    def _await_call(self, entry: Waiting, asker: Asker) -> None:
        while not entry.call.acquire(timeout=asker.patience(LOOK_SECONDS)):
            if asker.problem() is not None and self._withdraw(entry):
                asker.check()

    def _withdraw(self, entry: Waiting) -> bool:
        """Takes work out of the queue; returns whether it was still waiting there."""
        with self._mutex:
            if not entry.is_waiting:
                return False
            self._queue.leave(entry)
            return True

    def _leave(self, entry: Waiting | None) -> None:
        with self._mutex:
            if entry is not None:
                self._queue.leave(entry)
            if self._queue:
                self._queue.take().call.release()  # which has this core now
            else:
                self._free += 1
