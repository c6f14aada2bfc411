"""A lane for ordinary code, and what watches lanes."""

import math
import os
import threading
import time
from queue import SimpleQueue
from typing import TypeVar

import grpc

from lossd_client import _lanes
from lossd_client._calls import Call
from lossd_client._retries import Deadline

R = TypeVar("R")

_LOOK_SECONDS = 0.05
"""How often it is seen whether a lane is idle, or an answer late."""

_END_SECONDS = 0.2
"""How long a fork waits for lanes to end."""

_THREADS = 3
"""Of a lane: gRPC's two, and the one that watches."""


class LaneOfThreads(_lanes.Lane):
    """A lane on which a thread waits for its answer."""

    def __init__(self, channel: grpc.Channel, method: str) -> None:
        super().__init__(channel, method)
        self._lock = threading.Lock()
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._late_from: float | None = None
        self._idle_since = time.monotonic()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(self.path)
        _require_threads(_THREADS)
        known = set(threading.enumerate())
        self._answers = stream(iter(self._requests.get, None), **_lanes.SETTINGS)
        self._threads = [thread for thread in set(threading.enumerate()) - known if thread.daemon]
        _watch.add(self)

    def ask(self, call: Call[R], request: bytes, deadline: Deadline) -> R | None:
        """Returns the result of a call; None where it is to be made by itself.

        Raises:
            LossdError: The request was refused, or the deadline has passed.
        """
        return self.result(call, self._exchange(self.message(request), self.patience(deadline)), deadline)

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        with self._lock:
            self._close()

    def end(self) -> None:
        """Ends it at once, and waits until its threads have left gRPC."""
        self.close()
        self._answers.cancel()
        until = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(until - time.monotonic(), 0.0))

    def look(self) -> bool:
        """Ends it where it is idle, or an answer late; returns whether there is more to look at."""
        now = time.monotonic()
        with self._lock:
            is_late = self._late_from is not None and now > self._late_from
            if self._late_from is None and now - self._idle_since > _lanes.IDLE_SECONDS:
                self._close()
        if is_late:
            self._answers.cancel()
        return bool(self._answers.is_active())

    def _exchange(self, message: bytes, patience: float | None) -> bytes | None:
        """Returns what comes for a message; None where nothing does."""
        data = None
        self.is_sent = self._send(message, patience)
        try:
            if self.is_sent:
                data = next(self._answers, None)
                self.has_failed = data is None
        except grpc.RpcError:
            self.has_failed = True
        finally:
            with self._lock:
                self._late_from, self._idle_since = None, time.monotonic()
            if data is None:  # also where the caller was interrupted: an answer would be taken for the next
                self.close()
                self._answers.cancel()
        return data

    def _send(self, message: bytes, patience: float | None) -> bool:
        with self._lock:
            if self.is_open:
                self._late_from = math.inf if patience is None else time.monotonic() + patience
                self._requests.put(message)
            return self.is_open

    def _close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._requests.put(None)


def _require_threads(count: int) -> None:
    """Raises `RuntimeError` where so many threads cannot be made.

    Where gRPC cannot make one for a stream, whoever then closes its channel waits for ever.
    """
    over, made = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            made.append(thread)
    finally:
        over.set()
        for thread in made:
            thread.join()


class _Watch:
    """Looks at lanes, on a thread that is there as long as there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lanes: set[LaneOfThreads] = set()
        self._thread: threading.Thread | None = None

    def add(self, lane: LaneOfThreads) -> None:
        """Looks at a lane until it has ended; raises `RuntimeError` where there is no thread for it."""
        with self.lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lossd-lanes", daemon=True)
                thread.start()
                self._thread = thread
            self.lanes.add(lane)

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self.lock:
                lanes = list(self.lanes)
            ended = {lane for lane in lanes if not lane.look()}
            with self.lock:
                self.lanes -= ended
                if not self.lanes:
                    self._thread = None
                    return


_watch = _Watch()


def _before_fork() -> None:
    """Ends all lanes: what is open when a process forks keeps gRPC from working in the child."""
    _watch.lock.acquire()
    for lane in _watch.lanes:
        lane.end()


def _after_fork_in_parent() -> None:
    _watch.lock.release()


def _after_fork_in_child() -> None:
    global _watch  # noqa: PLW0603  # its thread is the parent's, who has its lock
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
