"""Which calls are still being worked on or answered: what a stopping server waits for."""

import threading
from types import TracebackType


class InFlight:
    """Counts calls from their arrival until they are answered, and requests until their work is done.

    A stream is answered when it has ended, to which a stopping server sees. Watchers of health do not
    count: they would hold up a stop for no one's sake.
    """

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.end()

    def begin(self) -> None:
        """Counts one more."""
        with self._changed:
            self._count += 1

    def end(self) -> None:
        """Counts one less."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_until_none(self, timeout: float) -> bool:
        """Waits until none is left; returns whether that came within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout)
