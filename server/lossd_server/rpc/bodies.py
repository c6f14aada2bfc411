"""Bodies of requests as they come, or do not: whoever sends one too slowly is hung up on."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc

from lossd.headers import CANCELLED_FOR
from lossd.wire import Buffer
from lossd_server.errors import Reason, SlowBodyError

T = TypeVar("T")

_LOOKS = 4
"""How often those who wait are looked through in the time that one may wait."""

_LONGEST_SLEEP = 1.0


class Body:
    """Bytes that have come, to be taken once: gRPC keeps what it hands out until something else comes."""

    __slots__ = ("_data",)

    def __init__(self, data: Buffer) -> None:
        self._data = data

    def take(self) -> Buffer:
        """Returns them, and lets go of them."""
        data, self._data = self._data, b""
        return data

    def __len__(self) -> int:
        return len(self._data)


class _Wait:
    """A call whose body has not come.

    Attributes:
        call: The call.
        began: When it began to be waited for.
        since: Since when nothing of it has come.
        is_given_up: Whether it was ended.
    """

    __slots__ = ("began", "call", "is_given_up", "since")

    def __init__(self, call: grpc.ServicerContext) -> None:
        self.call = call
        self.began = self.since = time.monotonic()
        self.is_given_up = False


class BodyReader:
    """Waits for bodies, for a time.

    gRPC has a thread wait for each, which wakes up when its call is cancelled: a thread of this class's own
    looks through those who wait, and does that to whoever has for too long.

    Args:
        seconds: How long a body may take.
        most: How many are waited for: when another comes, whoever has waited longest is given up. None for
            any number.
        look: Called as often as those who wait are looked through.
        begin: Called first by the thread that does.
    """

    def __init__(
        self,
        seconds: float,
        most: int | None = None,
        look: Callable[[], object] = lambda: None,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._look_too = look
        self._begin_look = begin
        self._lock = threading.Lock()
        self._waits: dict[_Wait, None] = {}  # of whom nothing has come for longest comes first
        self._watch: threading.Thread | None = None
        self._closed = threading.Event()

    def read(self, take: Callable[[Callable[[], None]], T], call: grpc.ServicerContext) -> T:
        """Returns the body of a call.

        Args:
            take: Waits for all of it, and returns it. Is given what it may call when some of it has come.
            call: The call.

        Raises:
            SlowBodyError: It did not come in time.
            grpc.RpcError: The caller is gone.
        """
        wait = self._begin(call)
        try:
            body = take(partial(self._note_progress, wait))
        except Exception:
            if not wait.is_given_up:
                raise
        finally:
            with self._lock:
                self._waits.pop(wait, None)
        if wait.is_given_up:
            raise SlowBodyError(
                Reason.BODY_TOO_SLOW,
                f"the body did not come within {self._seconds:g} s, or others were waiting",
                limit=self._seconds,
            )
        return body

    def give_up_oldest(self, least_seconds: float = 0.0) -> None:
        """Ends the call of whose body nothing has come for longest, if nothing has for so long."""
        with self._lock:
            wait = next(iter(self._waits), None)
            if wait is None or time.monotonic() - wait.since < least_seconds:
                return
            self._give_up(wait)
        _hang_up(wait.call)

    def close(self) -> None:
        """Lets the thread go."""
        self._closed.set()

    def _begin(self, call: grpc.ServicerContext) -> _Wait:
        wait = _Wait(call)
        with self._lock:
            self._waits[wait] = None
            crowded = self._most is not None and len(self._waits) > self._most
            if self._watch is None:
                self._watch = threading.Thread(target=self._look, name="lossd-bodies", daemon=True)
                self._watch.start()
        if crowded:
            self.give_up_oldest()
        return wait

    def _look(self) -> None:
        self._begin_look()
        while not self._closed.wait(min(self._seconds / _LOOKS, _LONGEST_SLEEP)):
            self._give_up_late()
            self._look_too()

    def _give_up_late(self) -> None:
        """Ends the calls whose bodies take too long."""
        with self._lock:
            end = time.monotonic() - self._seconds
            late = [wait for wait in self._waits if wait.began <= end]
            for wait in late:
                self._give_up(wait)
        for wait in late:
            _hang_up(wait.call)

    def _give_up(self, wait: _Wait) -> None:
        del self._waits[wait]
        wait.is_given_up = True

    def _note_progress(self, wait: _Wait) -> None:
        with self._lock:
            if wait in self._waits:
                del self._waits[wait]  # to the end of the line
                self._waits[wait] = None
                wait.since = time.monotonic()


def _hang_up(call: grpc.ServicerContext) -> None:
    with suppress(grpc.RpcError, ValueError):  # it is gone, or has begun to be answered
        call.send_initial_metadata(((CANCELLED_FOR, Reason.BODY_TOO_SLOW),))
    call.cancel()
