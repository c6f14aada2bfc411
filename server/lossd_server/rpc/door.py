"""How a unary call comes in: judged before its body is read, and its place is free when it is over."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import grpc
import numpy as np
import structlog

from lossd.chunks import Assembly, ChunkError
from lossd.headers import REQUEST_BYTES
from lossd.v1 import loss_service_pb2 as pb
from lossd_server.engine import Admission, BufferPool, Home, Place
from lossd_server.errors import CallerGoneError, InvalidInputError, Reason, UnavailableError
from lossd_server.rpc.bodies import Body, BodyReader
from lossd_server.rpc.forms import parse

_log = structlog.get_logger()

_PATIENCE = 1.0
"""Seconds for which more of a body is waited for even where others want its place."""

_TOLD_SECONDS = 0.02
"""In which gRPC tells, after the end of a body, that its call has ended too."""

_MOST_DIGITS = 12
"""Of a size that could be so; Python takes long over numbers of very many."""


class Door:
    """Lets calls in.

    Args:
        admission: Judges them.
        read_seconds: How long the body of one may take, and its answer to be taken.
        max_message_bytes: What gRPC reads of one: more than that none comes to.
        buffers: Memory for those that come in chunks.
        home: The core of the threads that make its own, which is no part of it.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        read_seconds: float,
        max_message_bytes: int,
        buffers: BufferPool,
        home: Home,
    ) -> None:
        self._admission = admission
        self._max_message_bytes = max_message_bytes
        self._read_seconds = read_seconds
        self._reader = BodyReader(read_seconds, look=self._hang_up, begin=home.leave)
        self._buffers = buffers

    def enter(self, call: grpc.ServicerContext) -> Place:
        """Lets a call in before its body is read; `Admission.leave` is to be called when its work is done.

        Raises:
            UnavailableError: There is no room.
        """
        try:
            place = self._admission.enter(call.peer(), min(_declared_size(call), self._max_message_bytes))
        except UnavailableError:
            self._make_room()
            raise
        place.hang_up = call.cancel
        if not call.add_callback(partial(self._end, place)):
            self._end(place)  # at once, where the caller is gone
        return place

    def receive(self, bodies: Iterator[Body], call: grpc.ServicerContext, place: Place) -> Body:
        """Returns the body of a call that was let in.

        Raises:
            SlowBodyError: It did not come in time.
            InvalidInputError: There is none.
            UnavailableError: It is larger than there is room for.
            CallerGoneError, grpc.RpcError: The caller is gone.
        """
        body = self._reader.read(lambda _came: next(bodies, None), call)
        if body is None:
            _require_caller(call)
            raise InvalidInputError(Reason.MALFORMED_REQUEST, "the call ended without a message", length=0)
        try:
            self._admission.receive(place, len(body))
        except UnavailableError:
            self._make_room()
            raise
        return body

    def assemble(self, chunks: Iterator[Body], call: grpc.ServicerContext, place: Place) -> Body:
        """Returns the body of a call that was let in and whose body comes in chunks.

        Raises:
            SlowBodyError: All of it did not come in time.
            InvalidInputError: They are no message, or one that is larger than any may be.
            UnavailableError: It is larger than there is room for.
            CallerGoneError, grpc.RpcError: The caller is gone.
        """
        try:
            body = Body(self._reader.read(partial(self._put_together, chunks, call, place), call))
            self._admission.receive(place, len(body))
        except UnavailableError:
            self._make_room()
            raise
        return body

    def _put_together(
        self,
        chunks: Iterator[Body],
        call: grpc.ServicerContext,
        place: Place,
        note_progress: Callable[[], None],
    ) -> memoryview:
        assembly = Assembly(partial(self._allocate, place))
        try:
            for chunk in chunks:
                assembly.add(parse(pb.ComputeLossInChunksRequest, chunk.take()))
                note_progress()
                if assembly.is_whole:
                    return assembly.whole()
            _require_caller(call)
            return assembly.whole()  # which says what is missing
        except ChunkError as error:
            raise InvalidInputError(
                Reason.MALFORMED_REQUEST,
                str(error),
                field="message_bytes",
                value=error.message_bytes,
                length=error.length,
            ) from error

    def _allocate(self, place: Place, size: int) -> memoryview:
        """Returns memory for a body of which the first chunk has come."""
        if size > self._max_message_bytes:
            raise InvalidInputError(
                Reason.MESSAGE_TOO_LARGE,
                f"is {size}, the server reads {self._max_message_bytes}",
                field="message_bytes",
                value=size,
                limit=self._max_message_bytes,
            )
        self._admission.declare(place, size)
        memory = self._buffers.allocate(size)
        return (np.empty(size, np.uint8) if memory is None else memory).data

    def _make_room(self) -> None:
        """Ends the call of whose body nothing has come for longest, if for long: the next one finds room."""
        self._reader.give_up_oldest(_PATIENCE)

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


def _require_caller(call: grpc.ServicerContext) -> None:
    """Raises `CallerGoneError` where a body ended since its caller ended the call.

    Of that gRPC tells the end of the body first.
    """
    ended = threading.Event()
    if not call.add_callback(ended.set) or ended.wait(_TOLD_SECONDS):
        raise CallerGoneError(Reason.CANCELLED, "the caller is gone")


def _declared_size(call: grpc.ServicerContext) -> int:
    """Returns what the caller says its body comes to, 0 where it says nothing that could be so."""
    for key, value in call.invocation_metadata():
        if key == REQUEST_BYTES and len(value) <= _MOST_DIGITS and value.isdigit():
            return int(value)
    return 0
