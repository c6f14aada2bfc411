"""Small calls that follow one another closely, on a stream that stays open for them.

To begin and end a call takes gRPC about as long as to carry a small message: an echo of 54 kB by call takes
0.47 ms, on a stream that is open already 0.33 (`lossd bench rpc-S`). Such a stream, a lane, holds a thread of the server. So it is opened
when it pays, is one caller's at a time, and does not stay for long. Whatever ends it, a request that has no
answer then is made again as a call of its own.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from lossd.envelopes import envelope, opened
from lossd.headers import ONE_AT_A_TIME
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Parcel
from lossd.writing import placed
from lossd_client._calls import Call, method_path, read_answer, read_result
from lossd_client._errors import LossdError, UnavailableError, error_of_answer
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

LIFE_SECONDS = 10.0
"""How long a lane lasts at most. It is used for the first half of that, so that every call has the other."""

LEAST_SECONDS = 1.0
"""A call that may take no longer has no lane opened."""

REFUSED_SECONDS = 10.0
"""For how long none is opened after one that failed: the server has no more to give, or is going away."""

_MOST_MARKS = 100
"""Requests are marked from 1 to this, and then anew: there is one at a time."""

METHODS = ("ComputeLoss", "AssignTargets")
"""Those that have lanes."""


class Lane:
    """What both clients know of a stream on which a request is sent when the one before it was answered.

    Args:
        channel: Where it is.
        method: The method whose requests it takes.
        deadline: That of the call that it is opened for.
        give_back: Called when a call on it is over.

    Attributes:
        channel: As above.
        give_back: As above.
        is_open: Whether another request may be sent.
        has_failed: Whether it has ended with an error, or for one.
    """

    def __init__(self, channel: Any, method: str, deadline: Deadline, give_back: Callable[[], None]) -> None:
        now, remaining = time.monotonic(), deadline.remaining()
        self.channel = channel
        self.give_back = give_back
        self.is_open = True
        self.has_failed = False
        self._life = LIFE_SECONDS if remaining is None else min(LIFE_SECONDS, remaining / 2)
        self._last_use, self._end = now + self._life / 2, now + self._life
        self._name = f"{method}Stream"
        self._mark = 0

    @property
    def path(self) -> str:
        """What gRPC calls its method."""
        return method_path(self._name)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What goes with its call."""
        return {"timeout": self._life, "metadata": ((ONE_AT_A_TIME, "1"),)}

    @property
    def is_fresh(self) -> bool:
        """Whether another call may begin on it."""
        return self.is_open and time.monotonic() < self._last_use

    def ends_by(self, deadline: Deadline) -> bool:
        """Whether a call is over at its deadline even if only the end of the lane ends it."""
        return not deadline.is_before(self._end)

    def next_message(self, request: bytes) -> bytes:
        """Returns what is sent for a request."""
        self._mark = self._mark % _MOST_MARKS + 1
        return b"".join(placed(envelope(self._mark, [request])))

    def result(self, call: Call[R], data: bytes) -> R | None:
        """Returns the result of a call; None where this is not the answer to its request.

        Raises:
            LossdError: The request was refused.
        """
        found = opened(data)
        if found is not None and found[0] == self._mark:
            return call.result(data[found[1] :])
        answer = read_answer(self._name, data)
        if answer.message.id != self._mark:
            self.close()
            return None
        if answer.message.WhichOneof("outcome") == "error":
            raise self._refusal(answer.message.error)
        return read_result(call.method, call.read, Parcel(answer.message.response, answer.payloads))

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        raise NotImplementedError

    def _refusal(self, error: pb.Error) -> LossdError:
        refusal = error_of_answer(error)
        if isinstance(refusal, UnavailableError):  # this server is: a call may find another
            self.has_failed = True
            self.close()
        return refusal


L = TypeVar("L", bound=Lane)


class LaneKeeper(Generic[L]):
    """Opens the lanes of one method, one at a time, and gives them to one caller at a time.

    Args:
        method: The method.
        make: Opens a lane; takes what `Lane` does.
    """

    def __init__(self, method: str, make: Callable[[Any, str, Deadline, Callable[[], None]], L]) -> None:
        self._method = method
        self._make = make
        self._taken = threading.Lock()
        self._lane: L | None = None
        self._in_a_row = 0
        self._last_call = -math.inf
        self._refused_until = -math.inf

    def take(self, channel: Any, deadline: Deadline) -> L | None:
        """Returns a lane for a call; None where it goes by itself."""
        if not self._taken.acquire(blocking=False):
            return None
        lane = None
        try:
            lane = self._lane_for(channel, deadline)
        finally:
            if lane is None:
                self._taken.release()
        return lane

    def close(self) -> None:
        """Ends the lane, if there is one."""
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()

    def _lane_for(self, channel: Any, deadline: Deadline) -> L | None:
        now = time.monotonic()
        self._in_a_row = self._in_a_row + 1 if now - self._last_call < RAPID_SECONDS else 0
        self._last_call = now
        if self._lane is not None and self._lane.channel is not channel:
            self._lane = None  # made elsewhere, like its channel, and so not closed
        if self._lane is None or not self._lane.is_fresh:
            self.close()
            is_worth_it = self._in_a_row >= RAPID_CALLS and deadline.leaves(LEAST_SECONDS)
            if not is_worth_it or now < self._refused_until:
                return None
            self._lane = self._make(channel, self._method, deadline, self._give_back)
        return self._lane if self._lane.ends_by(deadline) else None

    def _give_back(self) -> None:
        if self._lane is not None and self._lane.has_failed:
            self._refused_until = time.monotonic() + REFUSED_SECONDS
        self._taken.release()
