"""What became of the calls of one kind."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from lossd_server.bench.load.answers import Failure


def _seconds() -> "array[float]":
    return array("d")


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of calls; of one caller, or of several added up.

    Attributes:
        measured_from: Calls that came to an end before are not counted.
        answered: What each answered call took, from when it was due, seconds.
        refused: What each refusal took, from when the call was made, seconds.
        errors: How many calls failed otherwise, by reason.
        refusals: How many were refused, by reason.
        seen: Answers whose turn to be looked at came or did not.
        wrong: Answers other than the expected one, of those that were looked at.
        checked: How many were looked at.
        bytes_moved: Requests and answers of what was answered.
        last: When the last one was answered, refused or given up.
    """

    measured_from: float = 0.0
    answered: "array[float]" = field(default_factory=_seconds)
    refused: "array[float]" = field(default_factory=_seconds)
    errors: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    wrong: int = 0
    checked: int = 0
    bytes_moved: int = 0
    last: float = 0.0

    @property
    def calls(self) -> int:
        """How many calls came to an end."""
        return len(self.answered) + len(self.refused) + self.errors.total()

    def count_answer(self, due: float, now: float, size: int) -> None:
        """Counts an answered call."""
        if now >= self.measured_from:
            self.answered.append(now - due)
            self.bytes_moved += size
            self.last = now

    def count_failure(self, made: float, now: float, failure: Failure) -> None:
        """Counts a call without a result."""
        if now < self.measured_from:
            return
        self.last = now
        if failure.retry_after is None:
            self.errors[failure.reason] += 1
        else:
            self.refused.append(now - made)
            self.refusals[failure.reason] += 1

    def count_check(self, *, right: bool) -> None:
        """Counts an answer that was looked at."""
        self.checked += 1
        self.wrong += not right

    def add(self, other: "Tally") -> None:
        """Adds the counts of another."""
        self.measured_from = other.measured_from
        self.answered.extend(other.answered)
        self.refused.extend(other.refused)
        self.errors.update(other.errors)
        self.refusals.update(other.refusals)
        self.seen += other.seen
        self.wrong += other.wrong
        self.checked += other.checked
        self.bytes_moved += other.bytes_moved
        self.last = max(self.last, other.last)
