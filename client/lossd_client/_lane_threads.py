"""A lane for ordinary code."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar
from weakref import WeakSet

import grpc

from lossd_client import _lanes
from lossd_client._calls import Call
from lossd_client._retries import Deadline

R = TypeVar("R")

_END_SECONDS = 1.0
"""How long a fork waits for lanes to end."""


class LaneOfThreads(_lanes.Lane):
    """A lane on which a thread waits for its answer."""

    def __init__(
        self, channel: grpc.Channel, method: str, deadline: Deadline, give_back: Callable[[], None]
    ) -> None:
        super().__init__(channel, method, deadline, give_back)
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(self.path)
        known = set(threading.enumerate())
        self._answers = stream(_until_idle(self._requests), **self.settings)
        self._threads = set(threading.enumerate()) - known
        _open_lanes.add(self)

    def ask(self, call: Call[R], request: bytes) -> R | None:
        """Returns the result of a call; None where the lane has ended without an answer.

        Raises:
            LossdError: The request was refused.
        """
        try:
            data = self._exchange(self.next_message(request))
            return None if data is None else self.result(call, data)
        finally:
            self.give_back()

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        self.is_open = False
        self._requests.put(None)

    def end(self) -> None:
        """Ends it at once, and waits until its threads have left gRPC."""
        self.close()
        self._answers.cancel()
        until = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))

    def _exchange(self, message: bytes) -> bytes | None:
        """Returns what comes for a message; None where the lane has ended."""
        data = None
        self._requests.put(message)
        try:
            data = next(self._answers, None)
        except grpc.RpcError:
            self.has_failed = True
        finally:
            if data is None:  # also where the caller was interrupted: the answer would be taken for the next
                self.close()
                self._answers.cancel()
        return data


def _until_idle(requests: "SimpleQueue[bytes | None]") -> Iterator[bytes]:
    """Yields requests until none has come for some time, or None has."""
    with suppress(Empty):
        while (request := requests.get(timeout=_lanes.IDLE_SECONDS)) is not None:
            yield request


def _end_lanes() -> None:
    for lane in list(_open_lanes):
        lane.end()


# What is open when a process forks keeps gRPC from working in the child.
_open_lanes: WeakSet[LaneOfThreads] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_lanes)
