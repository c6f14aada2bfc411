"""A name server for one name, on the loopback, whose addresses a test changes."""

import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_A, _IN = 1, 1
_RESPONSE = 0x8400
"""Flags of an authoritative answer."""


class Names(socketserver.UDPServer):
    """Answers every question for IPv4 addresses with the same ones.

    Attributes:
        ips: The addresses.
    """

    def __init__(self, *ips: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.ips = list(ips)

    def target(self, name: str, port: int) -> str:
        """What gRPC calls a name that it is to ask here for."""
        return f"dns://127.0.0.1:{self.server_address[1]}/{name}:{port}"


class _Answer(socketserver.BaseRequestHandler):
    server: Names

    def handle(self) -> None:
        query, reply_to = self.request
        end = query.index(b"\0", 12) + 5  # the name ends with an empty label; type and class follow
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        ips = self.server.ips if kind == _A else []
        header = query[:2] + struct.pack("!HHHHH", _RESPONSE, 1, len(ips), 0, 0)
        # Each refers to the name in the question, and counts for no time at all.
        record = b"\xc0\x0c" + struct.pack("!HHIH", _A, _IN, 0, 4)
        answers = b"".join(record + socket.inet_aton(ip) for ip in ips)
        reply_to.sendto(header + query[12:end] + answers, self.client_address)


@contextmanager
def names(*ips: str) -> Iterator[Names]:
    """A name server with these addresses."""
    with Names(*ips) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
