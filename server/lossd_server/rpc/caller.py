"""Who calls, as far as it matters to the answer."""

import time
from dataclasses import dataclass, field

import grpc

from lossd_server.engine import Asker


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The other end of a call.

    Attributes:
        asker: What the engine knows of it. All callers over Unix sockets are one flow, since gRPC does
            not tell them apart; those that share memory are told apart by that.
        is_on_this_host: Whether it came over a Unix socket, and so may share memory.
    """

    asker: Asker = field(default_factory=Asker)
    is_on_this_host: bool = False

    @classmethod
    def of(cls, call: grpc.ServicerContext) -> "Caller":
        """Returns who makes a call."""
        remaining, peer = call.time_remaining(), call.peer()
        return cls(
            asker=Asker(
                flow=peer,
                deadline=None if remaining is None else time.monotonic() + remaining,
                is_gone=lambda: not call.is_active(),
            ),
            is_on_this_host=peer.startswith("unix:"),
        )
