"""Who computes next."""

import threading
from collections import deque


class Turn:
    """A lock that threads get in the order in which they asked for it.

    A call that gRPC tried twice may so never write to its caller's memory after the second was answered.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """Waits for the turn, so many seconds at most; returns whether it came."""
        with self._mutex:
            if not self._taken:
                self._taken = True
                return True
            baton = threading.Lock()
            baton.acquire()
            self._waiting.append(baton)
        if baton.acquire(timeout=timeout):
            return True
        with self._mutex:
            if baton in self._waiting:
                self._waiting.remove(baton)
                return False
        return True  # it came as the time ran out

    def release(self) -> None:
        """Hands the turn to whoever waits longest."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
