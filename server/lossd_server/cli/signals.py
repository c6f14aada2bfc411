"""Signals that end the server."""

import signal
import socket
import threading
from collections.abc import Callable


def on_every_end(tell: Callable[[], None]) -> None:
    """Calls a function for every SIGTERM and SIGINT from now on, on a thread of its own.

    A handler in Python runs on the main thread alone, once that comes to its next instruction. A signal
    that arrives as it begins to wait for a lock, or on another thread, would be heard when the wait ends.
    """
    heard, said = socket.socketpair()
    said.settimeout(0)

    def listen() -> None:
        while heard.recv(1):
            tell()

    threading.Thread(target=listen, name="lossd-signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(said.detach())
