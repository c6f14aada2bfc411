"""Small calls that follow one another closely, on a stream that stays open for them.

On a stream that is open already gRPC answers sooner than a call that begins and ends: an echo of 54 kB in
0.36 ms in place of 0.51 (`lossd bench rpc-S`). Such a stream, a lane, holds a thread of the server. So it is
opened when it pays, is one caller's at a time, and does not stay for long. Whatever ends it, a request that
has no answer then is made again as a call of its own.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import grpc

from lossd.envelopes import envelope_head, opened
from lossd.headers import ONE_AT_A_TIME
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Parcel
from lossd_client._calls import Call, method_path, read_answer, read_result
from lossd_client._errors import DeadlineError, LossdError, UnavailableError, at_item, error_of_answer
from lossd_client._retries import Deadline

R = TypeVar("R")

LARGEST_BYTES = 128 << 10
"""Of requests that go on a lane: with larger ones it is not the call that takes the time."""

RAPID_CALLS = 4
"""Calls that follow one another before the next has a lane opened."""

RAPID_SECONDS = 0.02
"""In which each of them begins after the one before."""

IDLE_SECONDS = 1.0
"""After which a lane that nobody uses ends."""

USE_SECONDS = 5.0
"""After which no call begins on a lane any more: the next may find another server."""

FIRST_SECONDS = 1.0
"""How long the first answer may take, and not more than a quarter of its call's time: there are proxies that
hand requests on when all of them have come."""

LEAST_PAUSE, MOST_PAUSE = 10.0, 600.0
"""For how long none is opened after one that failed, as the server has no more to give, or is going away: for
longer each time, until one has answered."""

METHODS = ("ComputeLoss", "AssignTargets")
"""Those that have lanes."""

_MOST_MARKS = 100
"""Requests are marked from 1 to this, and then anew: there is one at a time."""

SETTINGS: Mapping[str, Any] = {"metadata": ((ONE_AT_A_TIME, "1"),), "timeout": 60.0}
"""What goes with the call that is a lane. It has ended before, unless its client is gone but its connection
is not, or an answer takes so long: then its request is made again as a call."""


class Lane:
    """What both clients know of a stream on which a request is sent when the one before it was answered.

    Args:
        channel: Where it is.
        method: The method whose requests it takes.

    Attributes:
        channel: As above.
        path: What gRPC calls its method.
        is_open: Whether another request may be sent.
        is_proven: Whether an answer has come.
        is_sent: Whether the latest request was sent.
        has_failed: Whether it ended when an answer was due, or gave none that was asked for.
    """

    def __init__(self, channel: Any, method: str) -> None:
        self.channel = channel
        self.is_open = True
        self.is_proven = self.is_sent = self.has_failed = False
        self._name = f"{method}Stream"
        self.path = method_path(self._name)
        self._last_use = time.monotonic() + USE_SECONDS
        self._mark = 0

    @property
    def is_fresh(self) -> bool:
        """Whether another call may begin on it."""
        return self.is_open and time.monotonic() < self._last_use

    def patience(self, deadline: Deadline) -> float | None:
        """Returns for how many seconds the next answer is waited for; None for no end."""
        remaining = deadline.remaining()
        if self.is_proven:
            return remaining
        return FIRST_SECONDS if remaining is None else min(FIRST_SECONDS, remaining / 4)

    def message(self, request: bytes) -> bytes:
        """Returns what is sent for the next request."""
        self._mark = self._mark % _MOST_MARKS + 1
        return envelope_head(self._mark, len(request)) + request

    def result(self, call: Call[R], data: bytes | None, deadline: Deadline) -> R | None:
        """Returns the result of a call; None where it is to be made by itself.

        Args:
            call: The call.
            data: What came for its request; None where nothing did.
            deadline: When it is to be over.

        Raises:
            LossdError: The request was refused, or the deadline has passed.
        """
        if data is None:
            if deadline.remaining() == 0:
                raise DeadlineError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            return None
        self.is_proven = True
        found = opened(data)
        if found is not None and found[0] == self._mark:
            return call.result(data[found[1] :])
        answer = read_answer(self._name, data)
        if answer.message.id != self._mark:
            self.has_failed = True
            self.close()
            return None
        if answer.message.WhichOneof("outcome") == "error":
            raise self._refusal(answer.message.error, call)
        return read_result(call.method, call.read, Parcel(answer.message.response, answer.payloads))

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        raise NotImplementedError

    def _refusal(self, error: pb.Error, call: Call[Any]) -> LossdError:
        refusal = at_item(error_of_answer(error), call.first_item)
        if isinstance(refusal, UnavailableError):  # this server is: a call may find another
            self.has_failed = True
            self.close()
        return refusal


L = TypeVar("L", bound=Lane)


class LaneKeeper(Generic[L]):
    """Opens the lanes of one method, one at a time, and gives them to one caller at a time.

    Args:
        method: The method.
        make: Opens a lane, of a channel and the method; raises `RuntimeError` where there are no threads.
    """

    def __init__(self, method: str, make: Callable[[Any, str], L]) -> None:
        self._method = method
        self._make = make
        self._taken = threading.Lock()
        self._lane: L | None = None
        self._in_a_row = 0
        self._last_call = -math.inf
        self._opens_from = -math.inf
        self._pause = LEAST_PAUSE

    def take(self, channel: Any) -> L | None:
        """Returns a lane for a call, to be given back after it; None where the call goes by itself."""
        if not self._taken.acquire(blocking=False):
            return None
        lane = None
        try:
            lane = self._lane_for(channel)
        finally:
            if lane is None:
                self._taken.release()
        return lane

    def give_back(self, lane: L) -> None:
        """Takes a lane back."""
        if lane.has_failed:
            self._opens_from = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, MOST_PAUSE)
        elif lane.is_proven:
            self._pause = LEAST_PAUSE
        self._taken.release()

    def close(self, channel: Any) -> None:
        """Ends the lane of a channel, if there is one; one of another was made elsewhere, as that was."""
        lane = self._lane
        if lane is not None and lane.channel is channel:
            self._lane = None
            lane.close()

    def _lane_for(self, channel: Any) -> L | None:
        now = time.monotonic()
        self._in_a_row = self._in_a_row + 1 if now - self._last_call < RAPID_SECONDS else 0
        self._last_call = now
        lane = self._lane
        if lane is not None and lane.channel is channel:
            if lane.is_fresh:
                return lane
            self.close(channel)
        if self._in_a_row < RAPID_CALLS or now < self._opens_from:
            return None
        try:
            self._lane = lane = self._make(channel, self._method)
        except RuntimeError:
            self._opens_from = now + MOST_PAUSE
            return None
        return lane
