"""Peers that begin to speak HTTP/2 and never finish, by their sockets."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import numpy as np
from h2.connection import H2Connection

from tests.service.support import assign_request, good_loss_request

SERVICE = "/lossd.v1.LossService"
_FRAME_HEADER = b"\x00\x10\x00\x01\x00\x00\x00\x00\x01"
"""Of a HEADERS frame of 4,096 bytes on stream 1 that does not end the headers."""


class Peer:
    """A connection, and what of HTTP/2 was said on it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.h2 = H2Connection()

    def send(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def begin(self) -> None:
        self.h2.initiate_connection()
        self.send()

    def call(self, method: str) -> int:
        """Sends the headers of a call, and returns the number of its stream."""
        stream = self.h2.get_next_available_stream_id()
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"{SERVICE}/{method}",
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self.h2.send_headers(stream, list(headers.items()))
        self.send()
        return stream

    def data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.send()

    def close(self) -> None:
        self.socket.close()


def say_nothing(peer: Peer) -> None:
    """Connected, and that was it."""


def begin_only(peer: Peer) -> None:
    """HTTP/2 begins, and no call comes."""
    peer.begin()


def half_the_headers(peer: Peer) -> None:
    peer.begin()
    peer.socket.sendall(_FRAME_HEADER + b"\x00" * 100)


def headers_only(peer: Peer) -> None:
    """A call whose request never comes."""
    peer.begin()
    peer.call("ComputeLoss")


def headers_of_many_calls(peer: Peer) -> None:
    peer.begin()
    for _ in range(20):
        peer.call("AssignTargets")


def half_a_message(peer: Peer) -> None:
    """A request of a megabyte, of which ten bytes come."""
    peer.begin()
    peer.data(peer.call("ComputeLoss"), b"\x00\x00\x10\x00\x00" + b"\x00" * 10)


def half_a_message_on_a_stream(peer: Peer) -> None:
    peer.begin()
    peer.data(peer.call("ComputeLossStream"), b"\x00\x00\x10\x00\x00" + b"\x00" * 10)


def stream_without_requests(peer: Peer) -> None:
    peer.begin()
    peer.call("AssignTargetsStream")


def reflection_without_requests(peer: Peer) -> None:
    peer.begin()
    stream = peer.h2.get_next_available_stream_id()
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    fields |= {"te": "trailers", "content-type": "application/grpc"}
    peer.h2.send_headers(stream, list(fields.items()))
    peer.send()


def answers_not_read(peer: Peer) -> None:
    """Good requests, whose answers fill the windows and are read by nobody."""
    peer.begin()
    data = good_loss_request().SerializeToString()
    for _ in range(50):
        peer.data(peer.call("ComputeLoss"), b"\x00" + len(data).to_bytes(4, "big") + data, end=True)


def large_answers_not_read(peer: Peer) -> None:
    """The same, each of megabytes."""
    peer.begin()
    scene = {"boxes": np.array([[4, 4, 600, 600]], np.float32), "labels": np.array([1])}
    data = assign_request([scene] * 2, (800, 1333)).SerializeToString()
    for _ in range(20):
        peer.data(peer.call("AssignTargets"), b"\x00" + len(data).to_bytes(4, "big") + data, end=True)


WAYS: tuple[Callable[[Peer], None], ...] = (
    say_nothing,
    begin_only,
    half_the_headers,
    headers_only,
    headers_of_many_calls,
    half_a_message,
    half_a_message_on_a_stream,
    stream_without_requests,
    reflection_without_requests,
    answers_not_read,
)


@contextmanager
def slow_peers(address: str, way: Callable[[Peer], None], count: int):
    """So many peers that have got as far as that, and stay there until the context ends."""
    with ExitStack() as stack:
        peers = []
        for _ in range(count):
            peer = Peer(address)
            stack.callback(peer.close)
            way(peer)
            peers.append(peer)
        time.sleep(0.5)  # what was sent has arrived
        yield peers
