"""Who waits for an answer, as far as it matters to the work."""

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

from lossd_server.errors import CallerGoneError, DeadlineError, LossdError, Reason

_SLACK_SECONDS = 0.1
"""A caller that leaves so shortly before its deadline does so for its sake: clocks and wires differ."""


def _never() -> bool:
    return False


class Asker(NamedTuple):
    """Whoever brought a job.

    Attributes:
        flow: With whom it shares its part of the device: a connection.
        deadline: When it gives up, on the clock of `time.monotonic`; None for never.
        is_gone: Whether nobody waits for the answer any more; asked from any thread.
    """

    flow: Hashable = None
    deadline: float | None = None
    is_gone: Callable[[], bool] = _never

    def patience(self, most: float) -> float:
        """Returns the seconds until the deadline, from 0 to `most`."""
        return most if self.deadline is None else min(max(self.deadline - time.monotonic(), 0.0), most)

    def problem(self) -> LossdError | None:
        """Returns why the answer would come to nothing, if it would."""
        left = _SLACK_SECONDS if self.deadline is None else self.deadline - time.monotonic()
        if left > 0 and not self.is_gone():
            return None
        if left < _SLACK_SECONDS:
            return DeadlineError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the work was done")
        return CallerGoneError(Reason.CANCELLED, "the caller is gone")

    def check(self) -> None:
        """Raises `DeadlineError` or `CallerGoneError` where nobody would take the answer."""
        problem = self.problem()
        if problem is None:
            return
        try:
            raise problem
        finally:
            del problem  # whose traceback leads back to here, and to the memory of the request
