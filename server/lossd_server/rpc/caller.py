"""Who calls, as far as it matters to the answer."""

import time
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The other end of a call.

    Attributes:
        deadline: When it gives up, on the clock of `time.monotonic`; None for never.
        is_on_this_host: Whether it came over a Unix socket, and so may share memory.
    """

    deadline: float | None = None
    is_on_this_host: bool = False

    @classmethod
    def of(cls, call: grpc.ServicerContext) -> "Caller":
        """Returns who makes a call."""
        remaining = call.time_remaining()
        return cls(
            deadline=None if remaining is None else time.monotonic() + remaining,
            is_on_this_host=call.peer().startswith("unix:"),
        )
