"""A socket that passes on what it is sent, until it is cut."""

import contextlib
import socket
import threading
from itertools import chain
from pathlib import Path
from typing import Self


class Relay:
    """Stands before a server on a Unix socket.

    Attributes:
        target: Where it listens.
    """

    def __init__(self, path: Path, server: str) -> None:
        self.target = f"unix:{path}"
        self._server = server.removeprefix("unix:")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for _, servers in self._open:
            with contextlib.suppress(OSError):
                servers.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *chain(*self._open)):
            end.close()

    def cut(self) -> None:
        """Breaks every connection there is towards the callers; the server does not hear of it."""
        for callers, _ in self._open:
            with contextlib.suppress(OSError):
                callers.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                callers, _ = self._listener.accept()
                servers = socket.socket(socket.AF_UNIX)
                servers.connect(self._server)
                self._open.append((callers, servers))
                for ends in ((callers, servers), (servers, callers)):
                    self._threads.append(threading.Thread(target=_pass_on, args=ends, daemon=True))
                    self._threads[-1].start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
