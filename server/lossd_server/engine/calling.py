"""Threads that wait in a fair queue until they are called."""

import threading
from dataclasses import dataclass, field

from lossd_server.engine.queue import Entry

LOOK_SECONDS = 0.1
"""How often one that waits looks whether its caller is still there."""


def _called_later() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(kw_only=True, slots=True, eq=False)
class Waiting(Entry):
    """A thread's entry in the queue.

    Attributes:
        call: Released when the thread is called.
    """

    call: threading.Lock = field(default_factory=_called_later)
