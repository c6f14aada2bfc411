"""When a caller calls."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """When a caller calls, on the clock of `time.monotonic`, which all processes of a host share.

    Attributes:
        begins: When its first call is due.
        ends: When no further call begins.
        interval: Seconds from one call to the next, whenever the answer comes; None calls again
            when the answer is there.
    """

    begins: float
    ends: float
    interval: float | None = None

    def starts(self) -> Iterator[float]:
        """Yields when each call is due, once it is.

        Where calls are due at intervals and the last one took longer than that, the next is due in the
        past: what it has waited by then is part of what it takes, or a server that stands still would
        seem fast. What is still due at the end is not called any more.
        """
        due = self.begins
        while max(due, time.monotonic()) < self.ends:
            _sleep_until(due)
            yield due
            due = time.monotonic() if self.interval is None else due + self.interval

    def pause(self, seconds: float | None) -> None:
        """Waits after a refusal, as it asks for; at intervals the next call comes when it is due anyway."""
        if self.interval is None and seconds is not None:
            _sleep_until(min(time.monotonic() + min(seconds, _LONGEST_PAUSE), self.ends))


def _sleep_until(due: float) -> None:
    left = due - time.monotonic()
    if left > 0:
        time.sleep(left)
