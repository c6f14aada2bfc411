"""Medians of calls in a row, taken side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a call took, seconds: quartiles of those in a row, and the first of such rows.

    Attributes:
        lower: First quartile.
        median: Median.
        upper: Third quartile.
        count: How many calls that is.
        first: Median of the calls that came right after other work, which had the caches; None where that
            is all that was timed.
    """

    lower: float
    median: float
    upper: float
    count: int
    first: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: When no further round begins.
        least_rounds: Rounds that are made even so.
        patience: Seconds after which these are not waited for either; one round is always made.
        most_rounds: Rounds after which it is enough.
        most_in_a_row: Calls of each in a round, beside its first.
    """

    seconds: float
    least_rounds: int
    patience: float
    most_rounds: int
    most_in_a_row: int


_GPU_ROUNDS = 15
_CYCLES_A_SECOND = 2e9
"""Of a GPU's clock, at most."""
_SPARE = 3
"""How many times as long as the host takes a GPU is kept busy meanwhile."""

_ROW_SECONDS = 0.1
"""After which no further call of a row is made."""
_LONG_SECONDS = 0.5
"""Calls that take so long are not made twice in a row: what caches hold is nothing to them."""

FULL = Effort(seconds=4.0, least_rounds=5, patience=10.0, most_rounds=300, most_in_a_row=20)
QUICK = Effort(seconds=0.15, least_rounds=3, patience=2.0, most_rounds=20, most_in_a_row=5)


def measure(
    calls: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> dict[str, Timing]:
    """Times calls in turn, a few of each in a row, so that all see the same machine.

    Args:
        calls: What to time, by name.
        effort: How long.
        device: Awaited before a clock is read.
    """
    most = {name: _most_in_a_row(_seconds(call, device), effort) for name, call in calls.items()}
    rows: dict[str, list[list[float]]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(effort.most_rounds):
        limit = effort.seconds if done >= effort.least_rounds else effort.patience
        if done and time.perf_counter() - began >= limit:
            break
        for name, call in calls.items():
            rows[name].append(_row(call, device, most[name]))
    return {name: summarise(taken) for name, taken in rows.items()}


def _most_in_a_row(seconds: float, effort: Effort) -> int:
    """Returns how often a call of so many seconds is made again in a row."""
    return 0 if seconds >= _LONG_SECONDS else effort.most_in_a_row


def _row(call: Callable[[], object], device: torch.device, most: int) -> list[float]:
    """Returns what a call took, and then what it took again, so many times at most."""
    seconds = [_seconds(call, device)]
    ends = time.perf_counter() + _ROW_SECONDS
    for _ in range(most):
        seconds.append(_seconds(call, device))
        if time.perf_counter() >= ends:
            break
    return seconds


def summarise(rows: Sequence[Sequence[float]]) -> Timing:
    """Returns the quartiles of what calls took but for the first of each row, if there are others."""
    again = [taken for row in rows for taken in row[1:]]
    first = [row[0] for row in rows]
    lower, median, upper = _quartiles(again or first)
    return Timing(
        lower=lower,
        median=median,
        upper=upper,
        count=len(again or first),
        first=statistics.median(first) if again else None,
    )


def _quartiles(seconds: list[float]) -> list[float]:
    # They want two numbers; one number twice is its own quartile.
    return statistics.quantiles(seconds if len(seconds) > 1 else seconds * 2, n=4, method="inclusive")


def gpu_seconds(call: Callable[[], object], host_seconds: float, device: torch.device) -> float:
    """Returns the median of what a GPU takes for a call, told of all of it before it begins.

    A trainer that is ahead of its GPU sees this and no more. What waits for the GPU on the way is timed
    with the wait.

    Args:
        call: What is timed.
        host_seconds: How long the host takes to tell, about.
        device: The GPU.
    """
    seconds: list[float] = []
    with torch.cuda.device(device):
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(_GPU_ROUNDS):
            _wait_for(device)
            torch.cuda._sleep(int(host_seconds * _SPARE * _CYCLES_A_SECOND))  # type: ignore[no-untyped-call]  # noqa: SLF001
            begins.record()
            result = call()
            ends.record()
            _wait_for(device)
            seconds.append(begins.elapsed_time(ends) / 1e3)
            del result
    return statistics.median(seconds)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    result = call()
    _wait_for(device)
    taken = time.perf_counter() - began
    del result  # freed outside of the time, as a caller would that uses it
    return taken


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
