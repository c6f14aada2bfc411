"""The standard services, health and reflection, on threads of their own and within bounds.

gRPC's servicers hold a thread for every watcher and every reflection stream, as long as its caller likes, and
for every call whose body does not come. Here none of them is a thread that `LossService` could use, and a
check of health waits for none of the others.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lossd_server.engine import Home, LockedBudget
from lossd_server.errors import InvalidInputError, LossdError, Reason, UnavailableError
from lossd_server.rpc.bodies import BodyReader
from lossd_server.rpc.refusals import Refusals

MAX_WATCHERS = 64
"""Watchers of health at a time: a load balancer's connections, each with one."""

MAX_REFLECTIONS = 8
"""Reflection streams at a time: people at a prompt."""

_MAX_WAITING = MAX_WATCHERS + MAX_REFLECTIONS
"""Calls whose body is waited for: as many as may come to seats at once, however slow the machine is. Beyond
that the oldest is given up."""

_SPARE_THREADS = 4
"""To check, and to refuse."""

_Behaviour = Callable[[Iterator[Any], grpc.ServicerContext], Any]


class StandardServices:
    """Handlers of health and reflection.

    Args:
        service_names: Names that health knows beside the empty one.
        refusals: Where refusals are recorded.
        read_seconds: How long a body may take, and the next request of a reflection stream.
        home: The core of the threads that make those of these, which are no part of it.
    """

    def __init__(
        self, service_names: tuple[str, ...], refusals: Refusals, read_seconds: float, home: Home
    ) -> None:
        self._names = ("", *service_names)
        # A watcher takes a thread here: the other way, one that does not read would block them all.
        self._health = health.HealthServicer(experimental_non_blocking=False)
        self._reflection = reflection.ReflectionServicer(
            (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        )
        self._refusals = refusals
        self._reader = BodyReader(read_seconds, most=_MAX_WAITING)
        self._watchers = LockedBudget(MAX_WATCHERS)
        self._reflections = LockedBudget(MAX_REFLECTIONS)
        threads = _MAX_WAITING + MAX_WATCHERS + MAX_REFLECTIONS + _SPARE_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lossd-standard", initializer=home.leave)

    def set_health(self, *, serving: bool) -> None:
        """Says whether the server serves."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def drain(self) -> None:
        """Says for good that the server does not serve."""
        self._health.enter_graceful_shutdown()

    def generic_handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Returns what a `grpc.Server` takes."""
        check, watch, reflect = map(self._on_own_threads, (self._check, self._watch, self._reflect))
        of_health = {
            "Check": grpc.stream_unary_rpc_method_handler(check, **_codec(health_pb2, "HealthCheck")),
            "Watch": grpc.stream_stream_rpc_method_handler(watch, **_codec(health_pb2, "HealthCheck")),
        }
        of_reflection = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                reflect, **_codec(reflection_pb2, "ServerReflection")
            )
        }
        return (
            grpc.method_handlers_generic_handler(health.SERVICE_NAME, of_health),
            grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, of_reflection),
        )

    def close(self) -> None:
        """Lets the threads go."""
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _on_own_threads(self, behaviour: _Behaviour) -> _Behaviour:
        def behave(requests: Iterator[Any], call: grpc.ServicerContext) -> Any:
            return behaviour(requests, call)

        behave.experimental_thread_pool = self._pool  # type: ignore[attr-defined]  # where gRPC looks for it
        return behave

    def _check(self, requests: Iterator[Any], call: grpc.ServicerContext) -> Any:
        with self._refusing("Check", call):
            return self._health.Check(self._first(requests, call), call)

    def _watch(self, requests: Iterator[Any], call: grpc.ServicerContext) -> Iterator[Any]:
        with self._refusing("Watch", call):
            request = self._first(requests, call)
            with _seat(self._watchers, "watchers", call):
                yield from self._health.Watch(request, call)

    def _reflect(self, requests: Iterator[Any], call: grpc.ServicerContext) -> Iterator[Any]:
        with self._refusing("ServerReflectionInfo", call), _seat(self._reflections, "streams", call):
            timely = iter(partial(self._reader.read, lambda _came: next(requests, None), call), None)
            yield from self._reflection.ServerReflectionInfo(timely, call)

    def _first(self, requests: Iterator[Any], call: grpc.ServicerContext) -> Any:
        request = self._reader.read(lambda _came: next(requests, None), call)
        if request is None:
            raise InvalidInputError(Reason.MALFORMED_REQUEST, "the call ended without a message", length=0)
        return request

    @contextmanager
    def _refusing(self, name: str, call: grpc.ServicerContext) -> Iterator[None]:
        try:
            yield
        except LossdError as error:
            self._refusals.abort(name, error, call)


def _codec(messages: Any, name: str) -> dict[str, Callable[..., Any]]:
    """Returns how a method's messages are read and written."""
    return {
        "request_deserializer": getattr(messages, f"{name}Request").FromString,
        "response_serializer": getattr(messages, f"{name}Response").SerializeToString,
    }


@contextmanager
def _seat(seats: LockedBudget, what: str, call: grpc.ServicerContext) -> Iterator[None]:
    """Takes one of the seats until the block ends; raises `UnavailableError` where none is left."""
    peer = call.peer()
    if not seats.take(peer):
        raise too_many(seats, what)
    try:
        yield
    finally:
        seats.give_back(peer)


def too_many(seats: LockedBudget, what: str) -> UnavailableError:
    """Returns the error of whoever found no seat."""
    return UnavailableError(
        Reason.TOO_MANY_STREAMS,
        f"{seats.used} {what} are open, and a connection has as many as are left of {seats.limit}",
        value=seats.used,
        limit=seats.limit,
    )
