"""Channels to the child process, and calls of its bare handlers, with nothing of ours around them."""

from collections.abc import Callable, Sequence
from queue import SimpleQueue

import grpc
from torch import Tensor

from lossd.channel_options import client_options
from lossd_server.bench.case import Workbench
from lossd_server.bench.child import ECHO_STREAM


def bare_call(bench: Workbench, tensors: Sequence[Tensor], *, method: str) -> Callable[[], None]:
    """Returns a call that sends the same bytes to a handler that makes nothing of them."""
    channel = channel_to(bench, bench.child().bare_address)
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    payload = _bytes_of(tensors)

    def send() -> None:
        call(payload)

    return send


def open_echo(bench: Workbench, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Returns what sends the same bytes on an open stream, and waits until they are back."""
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    channel = channel_to(bench, bench.child().bare_address)
    stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(ECHO_STREAM)
    answers = stream(iter(requests.get, None))
    bench.resources.callback(requests.put, None)
    payload = _bytes_of(tensors)

    def send() -> None:
        requests.put(payload)
        next(answers)

    return send


def channel_to(bench: Workbench, address: str) -> grpc.Channel:
    """Returns a channel with a client's options, which is closed with the workbench."""
    channel = grpc.insecure_channel(address, options=client_options())
    bench.resources.callback(channel.close)
    return channel


def _bytes_of(tensors: Sequence[Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)
