"""When a call that failed is made again, and how long it may take in all."""

import math
import random
import time
from dataclasses import dataclass

from lossd_client._errors import LossdError, UnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often, and after what pauses, a call is made again where no server answered it.

    Every method is idempotent, so that whatever was not answered may be asked again. That is done after
    an `UnavailableError` alone: no connection, one that broke, or work turned away. The pause is what
    the server asks for, where it does, and a random share, a half at least, of a backoff that grows with
    every failure. No pause outlasts the call's deadline: then the last error is raised at once.

    Attributes:
        max_attempts: Times that a call is made at most, at least 1; a stream's count starts anew with
            every answer.
        initial_backoff: Seconds of the first backoff.
        max_backoff: Seconds that it grows to.
        multiplier: By how much it grows, at least 1.
    """

    max_attempts: int = 6
    initial_backoff: float = 0.1
    max_backoff: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range with `ValueError`."""
        for name, at_least in (
            ("max_attempts", 1),
            ("initial_backoff", 0),
            ("max_backoff", self.initial_backoff),
            ("multiplier", 1),
        ):
            value = getattr(self, name)
            if not value >= at_least:
                raise ValueError(f"{name} is {value}, want at least {at_least}")

    def backoff(self, failures: int) -> float:
        """Returns the seconds of the backoff after so many failures, the random share not taken."""
        # The exponent stays within what a float holds.
        return min(self.initial_backoff * self.multiplier ** min(failures - 1, 99), self.max_backoff)


ONCE = RetryPolicy(max_attempts=1)
"""No second attempt."""


class Deadline:
    """When a call of the client's is to be over, with all that it takes: attempts, messages, pauses.

    Args:
        timeout: Seconds from now; None for no end.
    """

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Returns the seconds that are left, none below 0; None for no end."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def leaves(self, seconds: float) -> bool:
        """Returns whether there is time for a pause, and some after it."""
        remaining = self.remaining()
        return seconds < (math.inf if remaining is None else remaining)


class Attempts:
    """The attempts at one call.

    Attributes:
        deadline: When it is to be over.

    Args:
        policy: How many there may be.
        deadline: As above.
    """

    def __init__(self, policy: RetryPolicy, deadline: Deadline) -> None:
        self.deadline = deadline
        self._policy = policy
        self._failures = 0

    def pause_after(self, error: LossdError) -> float:
        """Returns the seconds until the attempt after one that failed; raises its error if it was the last.

        Args:
            error: What it failed with.
        """
        pause = self._pause(error)
        if isinstance(error, UnavailableError) and self.deadline.leaves(pause):
            self._failures += 1
            if self._failures < self._policy.max_attempts:
                return pause
        try:
            raise error from None
        finally:
            del error  # an error that its own frame refers to keeps the call's memory until it is collected

    def start_anew(self) -> None:
        """Forgets the failures, since there was an answer."""
        self._failures = 0

    def _pause(self, error: LossdError) -> float:
        share = random.uniform(0.5, 1.0)  # noqa: S311  # so that callers do not come back together
        return (error.retry_after or 0.0) + share * self._policy.backoff(self._failures + 1)
