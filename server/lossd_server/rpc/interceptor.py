"""Interceptors: how they are chained, and the one that counts and times every call (`grpc_server_*`)."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf import descriptor_pool

from lossd_server.rpc.metrics import HANDLED_CODES, Metrics
from lossd_server.rpc.series import Series, note

_Handler = Any
"""A `grpc.RpcMethodHandler`; only its stub is generic, and only at run time are its attributes known."""

_Behaviour = Callable[..., Any]
_THREAD_POOL = "experimental_thread_pool"
"""The attribute of a behaviour that names the threads that it is run on; gRPC looks for it."""


class Intercepted(grpc.GenericRpcHandler):
    """Handlers behind interceptors, which are chained once: gRPC's own chain makes functions for each call.

    Args:
        handlers: The handlers.
        interceptors: The first is asked first.
    """

    def __init__(
        self, handlers: grpc.GenericRpcHandler, interceptors: Sequence[grpc.ServerInterceptor]
    ) -> None:
        find: Callable[[grpc.HandlerCallDetails], _Handler | None] = handlers.service
        for interceptor in reversed(interceptors):
            find = partial(interceptor.intercept_service, find)
        self._find = find

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _Handler | None:
        """Returns the handler of a call; None of a method that is not among these."""
        return self._find(handler_call_details)


class MetricsInterceptor(grpc.ServerInterceptor):
    """Observes calls of known methods; unknown ones are refused by gRPC and have no label here."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._observed: dict[str, ObservedMethod] = {}
        self._wrapped: dict[str, tuple[_Handler, _Handler]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wraps the handler of a call."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrapped_once(handler, handler_call_details.method)

    def _wrapped_once(self, handler: _Handler, path: str) -> _Handler:
        """Returns the wrapped handler, the same for every call of a method that is not refused."""
        known, wrapped = self._wrapped.get(path, (None, None))
        if known is not handler:
            wrapped = wrap(handler, self._method(path))
            self._wrapped[path] = handler, wrapped
        return wrapped

    def _method(self, path: str) -> "ObservedMethod":
        """Returns the metrics of a method: looked up once, which takes time."""
        if path not in self._observed:
            self._observed[path] = ObservedMethod(self._metrics, path)
        return self._observed[path]


def _labels(path: str) -> tuple[str, str, str]:
    """Returns the type, service and name of a method, by the contract: that of a refusal may differ."""
    _, service, name = path.split("/")
    method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    return _TYPES[method.client_streaming, method.server_streaming], service, name


_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


class Around(Protocol):
    """What is done around whatever answers a call of a method."""

    def unary(self, behaviour: _Behaviour, request: Any, call: grpc.ServicerContext) -> Any:
        """Runs a behaviour with one answer."""

    def stream(self, behaviour: _Behaviour, request: Any, call: grpc.ServicerContext) -> Iterator[Any]:
        """Runs a behaviour with a stream of answers."""


def wrap(handler: _Handler, method: Around) -> _Handler:
    """Returns a handler with something done around its one behaviour, on the threads that it wants."""
    requests = "stream" if handler.request_streaming else "unary"
    responses = "stream" if handler.response_streaming else "unary"
    behaviour = getattr(handler, f"{requests}_{responses}")
    observed = partial(method.stream if handler.response_streaming else method.unary, behaviour)
    # Health's pool hangs on its class, whichever server came last, and is for another way of calling.
    if hasattr(behaviour, _THREAD_POOL) and not hasattr(behaviour, "experimental_non_blocking"):
        setattr(observed, _THREAD_POOL, getattr(behaviour, _THREAD_POOL))
    make: Callable[..., _Handler] = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
    return make(
        observed,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


class ObservedMethod:
    """The metrics of a method, around whatever answers a call of it.

    Args:
        metrics: All of them.
        path: What gRPC calls the method.
    """

    def __init__(self, metrics: Metrics, path: str) -> None:
        labels = _labels(path)
        self._handled = {code: metrics.handled.labels(*labels, code.name) for code in HANDLED_CODES}
        self._handled_otherwise = partial(metrics.handled.labels, *labels)
        self._started = metrics.started.labels(*labels)
        self._received = metrics.received.labels(*labels)
        self._sent = metrics.sent.labels(*labels)
        self._handling = metrics.handling.labels(*labels)
        self._once = (self._started, 1), (self._received, 1), (self._sent, 1)

    def unary(self, behaviour: _Behaviour, request: Any, call: grpc.ServicerContext) -> Any:
        """Runs a behaviour with one answer."""
        began = self._start()
        try:
            response = behaviour(self._counted(request), call)
        except BaseException:
            self._finish(began, call, failed=True)
            raise
        self._finish(began, call, sent=1)
        return response

    def stream(self, behaviour: _Behaviour, request: Any, call: grpc.ServicerContext) -> Iterator[Any]:
        """Runs a behaviour with a stream of answers."""
        began = self._start()
        try:
            for response in behaviour(self._counted(request), call):
                note((self._sent, 1))
                yield response
        except BaseException:
            self._finish(began, call, failed=True)
            raise
        self._finish(began, call)

    def whole(self, code: grpc.StatusCode, seconds: float) -> list[tuple[Series, float]]:
        """Returns what is to be noted of something that is as good as a call, once it is over."""
        return [*self._once, (self._handling, seconds), (self._handled_with(code), 1)]

    def _start(self) -> float:
        note((self._started, 1))
        return time.monotonic()

    def _counted(self, request: Any) -> Any:
        """Returns the request, or its stream, with every message counted."""
        return map(self._count, request) if hasattr(request, "__next__") else self._count(request)

    def _count(self, request: Any) -> Any:
        note((self._received, 1))
        return request

    def _finish(self, began: float, call: Any, *, failed: bool = False, sent: int = 0) -> None:
        seconds = time.monotonic() - began
        code = code_of_call(call, failed=failed)
        note((self._sent, sent), (self._handling, seconds), (self._handled_with(code), 1))

    def _handled_with(self, code: grpc.StatusCode) -> Series:
        return self._handled.get(code) or self._handled_otherwise(code.name)


def code_of_call(call: Any, *, failed: bool) -> grpc.StatusCode:
    """Returns what a call ends with.

    Args:
        call: The call.
        failed: Whether its behaviour raised.
    """
    code: grpc.StatusCode | None = call.code()
    if not call.is_active() and (code is None or not failed):
        return grpc.StatusCode.CANCELLED
    return code or (grpc.StatusCode.UNKNOWN if failed else grpc.StatusCode.OK)
