"""Servers that stand before a good one and do to its callers what networks and stopping servers do."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lossd.v1 import loss_service_pb2 as pb

UNLIMITED = [("grpc.max_receive_message_length", -1)]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def refuse(code: grpc.StatusCode = UNAVAILABLE, *, retry_after: float | None = None, **trailers: str) -> Any:
    """Turns a call away, with what servers say to go with it."""

    def act(_proxy: Any, _method: Any, _request: Any, call: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=code.value[0], message="not now")
        if retry_after is not None:
            detail = AnyMessage()
            delay = Duration()
            delay.FromNanoseconds(round(retry_after * 1e9))
            detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            status.details.append(detail)
        if trailers:
            call.set_trailing_metadata([(name.replace("_", "-"), value) for name, value in trailers.items()])
            call.abort(code, "not now")
        call.abort_with_status(rpc_status.to_status(status))

    return act


def delay(seconds: float) -> Any:
    """Passes a request on when its answer is late."""

    def act(proxy: Any, method: str, request: Any, call: grpc.ServicerContext) -> Any:
        proxy.released.wait(seconds)
        if not call.is_active():
            proxy.cancelled.append(method)
        return forward(proxy, method, request, call)

    return act


def forward(proxy: Any, method: str, request: Any, _call: grpc.ServicerContext) -> Any:
    """Passes a request on."""
    return proxy.channel.unary_unary(method)(request)


def cut_after(count: int) -> Any:
    """Passes a stream on, and breaks it after some answers."""

    def act(proxy: Any, method: str, requests: Any, call: grpc.ServicerContext) -> Iterator[bytes]:
        answers = forward_stream(proxy, method, requests, call)
        for _ in range(count):
            yield next(answers)
        call.abort(UNAVAILABLE, "cut")

    return act


def turn_away(*items: int, retry_after: float | None = None) -> Any:
    """Passes a stream on, but for some of its items, which are turned away for the time being."""
    error = pb.Error(code=UNAVAILABLE.value[0], message="busy", reason=pb.ERROR_REASON_DRAINING)
    if retry_after is not None:
        error.retry_delay_ms = round(retry_after * 1000)

    def act(proxy: Any, method: str, requests: Any, call: grpc.ServicerContext) -> Iterator[bytes]:
        for data in forward_stream(proxy, method, requests, call):
            answer = pb.ComputeLossStreamResponse.FromString(data)
            if answer.id in items:
                yield pb.ComputeLossStreamResponse(id=answer.id, error=error).SerializeToString()
            else:
                yield data

    return act


def forward_stream(proxy: Any, method: str, requests: Any, _call: grpc.ServicerContext) -> Iterator[bytes]:
    """Passes a stream on."""
    yield from proxy.channel.stream_stream(method)(proxy.noted(requests))


def forward_chunks(proxy: Any, method: str, chunks: Any, _call: grpc.ServicerContext) -> Iterator[bytes]:
    """Passes a request in chunks on."""
    taken = list(chunks)
    proxy.requests.append(b"".join(pb.ComputeLossInChunksRequest.FromString(chunk).data for chunk in taken))
    yield from proxy.channel.stream_stream(method)(iter(taken))


def delay_chunks(proxy: Any, method: str, chunks: Any, call: grpc.ServicerContext) -> Iterator[bytes]:
    """Passes a request in chunks on when nobody waits any more for its answer, or the test is over."""
    while call.is_active() and not proxy.released.wait(0.01):
        pass
    if not call.is_active():
        proxy.cancelled.append(method)
    yield from forward_chunks(proxy, method, chunks, call)


def answer_in_chunks(*chunks: pb.ComputeLossInChunksResponse) -> Any:
    """Answers a request in chunks with some of a server's own."""

    def act(_proxy: Any, _method: str, taken: Any, _call: grpc.ServicerContext) -> Iterator[bytes]:
        deque(taken, maxlen=0)
        yield from [chunk.SerializeToString() for chunk in chunks]

    return act


def break_after(count: int) -> Any:
    """Passes a request in chunks on, and breaks off after some chunks of the answer."""

    def act(proxy: Any, method: str, chunks: Any, call: grpc.ServicerContext) -> Iterator[bytes]:
        yield from list(forward_chunks(proxy, method, chunks, call))[:count]
        call.abort(UNAVAILABLE, "cut")

    return act


class Proxy(grpc.GenericRpcHandler):
    """A server that passes calls on to another, but for the first ones, each of which is acted upon.

    Attributes:
        calls: Names of the methods that were called, in order.
        times: When.
        requests: What was asked, in unary calls and in chunks, where it was passed on.
        metadata: What came with that.
        items: Places of the items of each stream.
        cancelled: Names of the methods whose callers were gone before they were passed on.
        released: Ends all delays.
        address: Where it listens.
    """

    def __init__(self, target: str, actions: Any = ()) -> None:
        self.channel = grpc.insecure_channel(target, options=UNLIMITED)
        self.actions = list(actions)
        self.calls: list[str] = []
        self.times: list[float] = []
        self.requests: list[bytes] = []
        self.metadata: list[Any] = []
        self.items: list[list[int]] = []
        self.cancelled: list[str] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(16), options=UNLIMITED)
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, call_details: grpc.HandlerCallDetails) -> Any:
        method = call_details.method

        def unary(request: bytes, call: grpc.ServicerContext) -> bytes:
            self.requests.append(request)
            self.metadata.append(call.invocation_metadata())
            return self._action(method, forward)(self, method, request, call)

        def stream(requests: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[bytes]:
            self.items.append([])
            yield from self._action(method, forward_stream)(self, method, requests, call)

        def in_chunks(chunks: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[bytes]:
            self.metadata.append(call.invocation_metadata())
            yield from self._action(method, forward_chunks)(self, method, chunks, call)

        if method.endswith("InChunks"):
            return grpc.stream_stream_rpc_method_handler(in_chunks)
        if method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def noted(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The requests of the latest stream, whose places are kept."""
        places = self.items[-1]
        for request in requests:
            places.append(pb.ComputeLossStreamRequest.FromString(request).id)
            yield request

    def stop(self) -> None:
        self.released.set()
        self._server.stop(0).wait()
        self.channel.close()

    def _action(self, method: str, otherwise: Any) -> Any:
        with self._lock:
            self.calls.append(method.rpartition("/")[2])
            self.times.append(time.monotonic())
            return self.actions.pop(0) if self.actions else otherwise


@contextmanager
def proxy_of(target: str, *actions: Any) -> Iterator[Proxy]:
    """A proxy that acts upon its first calls so."""
    proxy = Proxy(target, actions)
    try:
        yield proxy
    finally:
        proxy.stop()
