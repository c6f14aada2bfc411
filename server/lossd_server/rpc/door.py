"""How a unary call comes in: judged before its body is read, and its place is free when it is over."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol, TypeVar

import grpc
import structlog

from lossd.headers import REQUEST_BYTES
from lossd_server.engine import Admission, Place
from lossd_server.errors import InvalidInputError, LossdError, Reason
from lossd_server.rpc.bodies import BodyReader

_log = structlog.get_logger()

_PATIENCE = 1.0
"""Seconds for which a body is waited for even where others want its place."""

_MOST_DIGITS = 12
"""Of a size that could be so; Python takes long over numbers of very many."""


class _Sized(Protocol):
    def __len__(self) -> int: ...


B = TypeVar("B", bound=_Sized)


class Door:
    """Lets calls in.

    Args:
        admission: Judges them.
        read_seconds: How long the body of one may take, and its answer to be taken.
        max_message_bytes: What gRPC reads of one: more than that none comes to.
    """

    def __init__(self, admission: Admission, *, read_seconds: float, max_message_bytes: int) -> None:
        self._admission = admission
        self._max_message_bytes = max_message_bytes
        self._read_seconds = read_seconds
        self._reader = BodyReader(read_seconds, look=self._hang_up)

    def enter(self, call: grpc.ServicerContext) -> Place:
        """Lets a call in before its body is read; `Admission.leave` is to be called when its work is done.

        Raises:
            UnavailableError: There is no room.
        """
        try:
            place = self._admission.enter(call.peer(), min(_declared_size(call), self._max_message_bytes))
        except LossdError:
            self._reader.give_up_oldest(_PATIENCE)  # the next one finds room
            raise
        place.hang_up = call.cancel
        if not call.add_callback(partial(self._end, place)):
            self._end(place)  # at once, where the caller is gone
        return place

    def receive(self, bodies: Iterator[B], call: grpc.ServicerContext, place: Place) -> B:
        """Returns the body of a call that was let in.

        Raises:
            SlowBodyError: It did not come in time.
            InvalidInputError: There is none.
            UnavailableError: It is larger than there is room for.
            grpc.RpcError: The caller is gone.
        """
        body = self._reader.read(bodies, call)
        if body is None:
            raise InvalidInputError(Reason.MALFORMED_REQUEST, "the call ended without a message", length=0)
        self._admission.receive(place, len(body))
        return body

    def _end(self, place: Place) -> None:
        place.hang_up = None
        self._admission.leave(place)

    def _hang_up(self) -> None:
        count = self._admission.hang_up_on_idle(self._read_seconds)
        if count:
            _log.warning("hung up on callers that did not take their answers", count=count)

    def close(self) -> None:
        """Lets its thread go."""
        self._reader.close()


def _declared_size(call: grpc.ServicerContext) -> int:
    """Returns what the caller says its body comes to, 0 where it says nothing that could be so."""
    for key, value in call.invocation_metadata():
        if key == REQUEST_BYTES and len(value) <= _MOST_DIGITS and value.isdigit():
            return int(value)
    return 0
