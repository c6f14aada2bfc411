"""Who is let in: so many requests and so many of their bytes at a time, and room is left for others."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import takewhile

from lossd_server.errors import Reason, UnavailableError

_LEAST_RETRY, _MOST_RETRY = 0.05, 10.0
"""Seconds; sooner there is no room, and later is another day."""

_SMOOTHING = 0.1
"""What the latest request counts for in the mean time of one."""


class Budget:
    """Something of which there is only so much, and of which nobody gets more than is left for others.

    A holder may have as much as is free: alone half of it, two of them a third each. So there is always
    room for who comes next, and none is set aside for nobody.

    Args:
        limit: How much there is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[str, int] = {}

    def take(self, holder: str, amount: int) -> bool:
        """Takes an amount; returns whether there was room."""
        held = self._held.get(holder, 0) + amount
        if held > self.limit - self.used:
            return False
        if held:
            self._held[holder] = held
        self.used += amount
        return True

    def give_back(self, holder: str, amount: int) -> None:
        """Gives back what was taken."""
        self.used -= amount
        held = self._held.pop(holder, 0) - amount
        if held:
            self._held[holder] = held


class LockedBudget(Budget):
    """The same for threads."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._lock = threading.Lock()

    def take(self, holder: str, amount: int = 1) -> bool:
        """Takes an amount; returns whether there was room."""
        with self._lock:
            return super().take(holder, amount)

    def give_back(self, holder: str, amount: int = 1) -> None:
        """Gives back what was taken."""
        with self._lock:
            super().give_back(holder, amount)


class Place:
    """A request's place: from its arrival until it is worked off and its call has ended.

    Either may come last: a caller that goes away ends its call, but not the work.

    Attributes:
        peer: The connection that it came over.
        size: Bytes of its body, and of its answer, as far as they are known.
        received: When the body had come; None before.
        open_ends: How many of the two are to come.
        first_end: When the first of them came; None before.
        hang_up: Ends the call; None once it has ended.
    """

    __slots__ = ("first_end", "hang_up", "open_ends", "peer", "received", "size")

    def __init__(self, peer: str, size: int) -> None:
        self.peer = peer
        self.size = size
        self.received: float | None = None
        self.open_ends = 2
        self.first_end: float | None = None
        self.hang_up: Callable[[], object] | None = None


class Admission:
    """Lets requests in as long as the budgets have room, and knows which are not answered yet.

    Args:
        max_requests: Requests that are received, wait or are worked on, at most.
        max_bytes: Bytes of their bodies, at most.
        clock: Seconds, from any origin.
    """

    def __init__(
        self, *, max_requests: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = Budget(max_requests)
        self._bytes = Budget(max_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._half_out: dict[Place, None] = {}  # whose first end is longest ago comes first
        self._answered = threading.Condition(self._lock)
        self._unanswered = 0
        self._draining = False
        self._mean_seconds = 0.0
        self._last_left = clock()

    @property
    def requests(self) -> int:
        """How many requests are in."""
        return self._requests.used

    @property
    def bytes(self) -> int:
        """What their bodies come to."""
        return self._bytes.used

    def enter(self, peer: str, size: int = 0) -> Place:
        """Lets a request in whose body has not come yet; `leave` frees its place.

        Args:
            peer: The connection that it comes over.
            size: Bytes of its body, where that is known.

        Raises:
            UnavailableError: The server drains, or a budget has no room.
        """
        with self._lock:
            if self._draining:
                raise UnavailableError(Reason.DRAINING, "the server is stopping")
            if not self._requests.take(peer, 1):
                raise self._overloaded("requests", self._requests)
            if not self._bytes.take(peer, size):
                self._requests.give_back(peer, 1)
                raise self._overloaded("bytes", self._bytes)
        return Place(peer, size)

    def declare(self, place: Place, size: int) -> None:
        """Counts what the body of a request comes to, of which some has come.

        Raises:
            UnavailableError: There is no room for it.
        """
        with self._lock:
            self._declare(place, size)

    def receive(self, place: Place, size: int) -> None:
        """Counts what the body of a request really came to, and that it is to be answered from now on.

        Raises:
            UnavailableError: There is no room for it.
        """
        with self._lock:
            self._declare(place, size)
            place.received = self._clock()
            self._unanswered += 1

    def grow(self, place: Place, size: int) -> None:
        """Counts what the answer to a request comes to, beside its body.

        Raises:
            UnavailableError: There is no room for it.
        """
        with self._lock:
            if not self._bytes.take(place.peer, size):
                raise self._overloaded("bytes", self._bytes)
            place.size += size

    def hang_up_on_idle(self, seconds: float) -> int:
        """Ends calls whose answers have not been taken for so long; returns how many."""
        with self._lock:
            late = self._clock() - seconds
            idle = [*takewhile(lambda place: (place.first_end or late) < late, self._half_out)]
            for place in idle:
                del self._half_out[place]
        calls = [place.hang_up for place in idle if place.hang_up is not None]
        for hang_up in calls:
            hang_up()
        return len(calls)

    def leave(self, place: Place) -> None:
        """Says that the work of a request is done, or that its call has ended; both free its place."""
        with self._lock:
            place.open_ends -= 1
            if place.open_ends:
                place.first_end = self._clock()
                self._half_out[place] = None
                return
            self._half_out.pop(place, None)
            self._requests.give_back(place.peer, 1)
            self._bytes.give_back(place.peer, place.size)
            if place.received is not None:
                self._last_left = self._clock()
                self._mean_seconds += _SMOOTHING * (self._last_left - place.received - self._mean_seconds)
                self._end()

    def holding(self, peer: str, size: int) -> "Holding":
        """Returns what counts the bytes of a request on a stream: a context manager.

        Raises:
            UnavailableError: There is no room for them; raised where the block begins.
        """
        return Holding(self, Place(peer, 0), size)

    def give_back(self, place: Place) -> None:
        """Takes the bytes of a place back that is no request's."""
        with self._lock:
            self._bytes.give_back(place.peer, place.size)

    def begin(self) -> None:
        """Counts something else that is to be answered before the server stops."""
        with self._lock:
            self._unanswered += 1

    def end(self) -> None:
        """Takes back `begin`."""
        with self._lock:
            self._end()

    def drain(self) -> None:
        """Lets nobody in from now on."""
        with self._lock:
            self._draining = True

    def wait_until_answered(self, timeout: float) -> bool:
        """Waits until all is answered; returns whether that came within so many seconds."""
        with self._lock:
            return self._answered.wait_for(lambda: self._unanswered == 0, timeout)

    def _declare(self, place: Place, size: int) -> None:
        more = size - place.size
        if more > 0 and not self._bytes.take(place.peer, more):
            raise self._overloaded("bytes", self._bytes)
        if more < 0:
            self._bytes.give_back(place.peer, -more)
        place.size = size

    def _end(self) -> None:
        self._unanswered -= 1
        if not self._unanswered:
            self._answered.notify_all()

    def _overloaded(self, what: str, budget: Budget) -> UnavailableError:
        error = UnavailableError(
            Reason.OVERLOADED,
            f"{budget.used} {what} are in flight, and a connection has as many as are left of {budget.limit}",
            value=budget.used,
            limit=budget.limit,
        )
        error.retry_seconds = self._retry_seconds()
        return error

    def _retry_seconds(self) -> float:
        """Returns when those that are in now will be out: as long as one was in of late.

        Longer where none has come out for longer. Spread, so that those who are turned away together do
        not come again together.
        """
        expected = max(self._mean_seconds, self._clock() - self._last_left)
        return min(max(expected, _LEAST_RETRY), _MOST_RETRY) * random.uniform(0.75, 1.25)  # noqa: S311


class Holding(AbstractContextManager[Place]):
    """Bytes that count until a block ends: a class, since a generator takes three times as long."""

    __slots__ = ("_admission", "_place", "_size")

    def __init__(self, admission: Admission, place: Place, size: int) -> None:
        self._admission = admission
        self._place = place
        self._size = size

    def __enter__(self) -> Place:
        self._admission.grow(self._place, self._size)
        return self._place

    def __exit__(self, *_exception: object) -> None:
        self._admission.give_back(self._place)
