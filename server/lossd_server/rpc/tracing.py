"""OpenTelemetry spans of calls, requests and their stages. Imported only where tracing is on.

```
lossd.v1.LossService/ComputeLoss           server, child of the caller's span
├── decode   ├── queue   ├── compute   └── encode

lossd.v1.LossService/ComputeLossStream
└── ComputeLoss                            one for each request
    ├── decode   ├── queue   ├── compute   └── encode
```
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import grpc
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from lossd_server.errors import LossdError
from lossd_server.rpc.interceptor import code_of_call, wrap
from lossd_server.rpc.method_names import IN_CHUNKS
from lossd_server.rpc.stages import Stages
from lossd_server.rpc.status import code_of, shorten

_SERVERS_FAULT = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that OpenTelemetry's conventions call errors of a server; others are the caller's."""


class Tracing:
    """Makes the spans of one server.

    Args:
        tracer: What makes them.
        service_name: Full name of the service whose calls have any; health's have none.
        close: Called at the end, to send what is left.
    """

    def __init__(self, tracer: Tracer, service_name: str, close: Callable[[], None]) -> None:
        self._tracer = tracer
        self._prefix = f"/{service_name}/"
        self._streams: WeakKeyDictionary[grpc.ServicerContext, Context] = WeakKeyDictionary()
        self.close = close

    def interceptor(self) -> grpc.ServerInterceptor:
        """Returns what makes the span of each call."""
        return _Interceptor(self)

    def stages(self, method: str, call: grpc.ServicerContext) -> Stages:
        """Returns the stages of a request: of its call, or of a span of its own on a stream."""
        stream = self._streams.get(call)
        context = contexts.get_current() if stream is None else stream
        if not trace.get_current_span(context).is_recording():
            return Stages()
        if stream is None:
            return _TracedStages(self._tracer, context)
        span = self._tracer.start_span(method, context=stream)
        return _StagesOnStream(self._tracer, span, stream)

    def mark_refusal(self, error: LossdError) -> None:
        """Says in the current span why its request was refused."""
        span = trace.get_current_span()
        span.set_attributes({"lossd.reason": str(error.reason), "lossd.field": shorten(error.field)})
        _set_code(span, code_of(error))

    def wrap(self, handler: Any, path: str) -> Any:
        """Returns a handler whose calls are spans, if they are to be."""
        if handler is None or not path.startswith(self._prefix):
            return handler
        return wrap(handler, _TracedMethod(self, path.removeprefix("/")))

    @contextmanager
    def span_of_call(self, name: str, call: grpc.ServicerContext) -> Iterator[Context]:
        """Makes the span of a call, and yields the context that it is in."""
        parent = propagate.extract({k: v for k, v in call.invocation_metadata() if isinstance(v, str)})
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        failed = True
        try:
            yield trace.set_span_in_context(span, parent)
            failed = False
        finally:
            _set_code(span, code_of_call(call, failed=failed))
            span.end()

    @contextmanager
    def span_of_stream(self, name: str, call: grpc.ServicerContext) -> Iterator[Context]:
        """The same for a stream, whose requests are worked on by other threads."""
        with self.span_of_call(name, call) as context:
            self._streams[call] = context
            yield context


@contextmanager
def _attached(context: Context) -> Iterator[None]:
    """Makes a context that of this thread, which works on one call at a time."""
    token = contexts.attach(context)
    try:
        yield
    finally:
        contexts.detach(token)


def _set_code(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.response.status_code", code.name)
    if code in _SERVERS_FAULT:
        span.set_status(StatusCode.ERROR)


class _Interceptor(grpc.ServerInterceptor):
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        return self._tracing.wrap(continuation(handler_call_details), handler_call_details.method)


class _TracedMethod:
    """Makes spans around whatever answers a call of a method."""

    def __init__(self, tracing: Tracing, name: str) -> None:
        self._tracing = tracing
        self._name = name

    def unary(self, behaviour: Callable[..., Any], request: Any, call: grpc.ServicerContext) -> Any:
        with self._tracing.span_of_call(self._name, call) as context, _attached(context):
            return behaviour(request, call)

    def stream(
        self, behaviour: Callable[..., Any], request: Any, call: grpc.ServicerContext
    ) -> Iterator[Any]:
        is_one_request = self._name.endswith(IN_CHUNKS)
        span = self._tracing.span_of_call if is_one_request else self._tracing.span_of_stream
        with span(self._name, call) as context, _attached(context):
            yield from behaviour(request, call)


class _TracedStages(Stages):
    """Stages that become spans: one that is timed when it ends, one that is added behind the last."""

    def __init__(self, tracer: Tracer, context: Context) -> None:
        super().__init__()
        self._tracer = tracer
        self._context = context
        self._began = time.time_ns()

    def begin(self, stage: str) -> None:
        if stage != self._stage:
            super().begin(stage)
            self._began = time.time_ns()

    def add(self, stage: str, seconds: float) -> None:
        super().add(stage, seconds)
        ended = self._began + round(seconds * 1e9)
        self._tracer.start_span(stage, self._context, start_time=self._began).end(ended)
        self._began = ended


class _StagesOnStream(_TracedStages):
    """Stages of a request on a stream, under a span of its own."""

    def __init__(self, tracer: Tracer, span: Span, stream: Context) -> None:
        context = trace.set_span_in_context(span, stream)
        super().__init__(tracer, context)
        self._span = span
        self._token = contexts.attach(context)

    def close(self) -> None:
        super().close()
        contexts.detach(self._token)
        self._span.end()
