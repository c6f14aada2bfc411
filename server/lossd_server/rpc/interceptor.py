"""Counts and times every call, whatever service it is for: the `grpc_server_*` metrics."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from lossd_server.rpc.metrics import Metrics

_Handler = Any
"""A `grpc.RpcMethodHandler`; only its stub is generic, and only at run time are its attributes known."""


class MetricsInterceptor(grpc.ServerInterceptor):
    """Observes calls of known methods; unknown ones are refused by gRPC and have no label here."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
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
        """Returns the wrapped handler, the same for every call of a method: labels take time to look up."""
        known, wrapped = self._wrapped.get(path, (None, None))
        if known is not handler:
            _, service, method = path.split("/")
            wrapped = self._wrap(handler, service, method)
            self._wrapped[path] = handler, wrapped
        return wrapped

    def _wrap(self, handler: _Handler, service: str, method: str) -> _Handler:
        """Returns the handler with its one behaviour observed."""
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        observed = _ObservedMethod(
            self._metrics,
            (_TYPES[requests, responses], service, method),
            getattr(handler, f"{requests}_{responses}"),
        )
        behaviour = observed.stream if handler.response_streaming else observed.unary
        make: Callable[..., _Handler] = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        return make(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


_TYPES = {
    ("unary", "unary"): "unary",
    ("stream", "unary"): "client_stream",
    ("unary", "stream"): "server_stream",
    ("stream", "stream"): "bidi_stream",
}


class _ObservedMethod:
    """A method's behaviour with its metrics."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str], behaviour: Callable[..., Any]) -> None:
        self._labels = labels
        self._behaviour = behaviour
        self._handled = metrics.handled
        self._started = metrics.started.labels(*labels)
        self._received = metrics.received.labels(*labels)
        self._sent = metrics.sent.labels(*labels)
        self._handling = metrics.handling.labels(*labels)

    def unary(self, request: Any, call: grpc.ServicerContext) -> Any:
        """Runs a method with one answer."""
        began = self._start()
        try:
            response = self._behaviour(self._counted(request), call)
            self._sent.inc()
        except BaseException:
            self._finish(began, call, failed=True)
            raise
        self._finish(began, call)
        return response

    def stream(self, request: Any, call: grpc.ServicerContext) -> Iterator[Any]:
        """Runs a method with a stream of answers."""
        began = self._start()
        try:
            for response in self._behaviour(self._counted(request), call):
                self._sent.inc()
                yield response
        except BaseException:
            self._finish(began, call, failed=True)
            raise
        self._finish(began, call)

    def _start(self) -> float:
        self._started.inc()
        return time.monotonic()

    def _counted(self, request: Any) -> Any:
        """Returns the request, or its stream, with every message counted."""
        if not isinstance(request, Iterator):
            self._received.inc()
            return request
        return self._counted_stream(request)

    def _counted_stream(self, requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            self._received.inc()
            yield request

    def _finish(self, began: float, call: Any, *, failed: bool = False) -> None:
        self._handling.observe(time.monotonic() - began)
        code = call.code() or (grpc.StatusCode.UNKNOWN if failed else grpc.StatusCode.OK)
        if not call.is_active() and not failed:
            code = grpc.StatusCode.CANCELLED
        self._handled.labels(*self._labels, code.name).inc()
