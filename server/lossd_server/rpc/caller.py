"""Who calls, as far as it matters to the answer."""

import time
from collections.abc import Callable
from typing import NamedTuple

import grpc

from lossd_server.engine import Asker


def _unlimited(_size: int) -> None:
    """There is room for any answer."""


class Caller(NamedTuple):
    """The other end of a call.

    Attributes:
        asker: What the engine knows of it. All callers over Unix sockets are one flow, since gRPC does
            not tell them apart; those that share memory are told apart by that.
        is_on_this_host: Whether it came over a Unix socket, and so may share memory.
        reserve: Counts bytes of the answer before they are there; raises where there is no room.
    """

    asker: Asker = Asker()
    is_on_this_host: bool = False
    reserve: Callable[[int], None] = _unlimited

    @classmethod
    def of(cls, call: grpc.ServicerContext, peer: str, reserve: Callable[[int], None]) -> "Caller":
        """Returns who makes a call, whose peer was asked for before: gRPC makes that name anew each time."""
        remaining = call.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        asker = Asker(peer, deadline, lambda: not call.is_active())
        return cls(asker, peer.startswith("unix:"), reserve)
