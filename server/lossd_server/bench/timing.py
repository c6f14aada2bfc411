"""Medians of several calls, taken side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a call took, seconds: quartiles over some rounds."""

    lower: float
    median: float
    upper: float
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: When no further round begins.
        least_rounds: Rounds that are made even so.
        patience: Seconds after which these are not waited for either; one round is always made.
        most_rounds: Rounds after which it is enough.
        warm_ups: Calls of each before the first round.
    """

    seconds: float
    least_rounds: int
    patience: float
    most_rounds: int
    warm_ups: int


_GPU_ROUNDS = 15
_CYCLES_A_SECOND = 2e9
"""Of a GPU's clock, at most."""
_SPARE = 3
"""How many times as long as the host takes a GPU is kept busy meanwhile."""

FULL = Effort(seconds=3.0, least_rounds=5, patience=10.0, most_rounds=2000, warm_ups=1)
QUICK = Effort(seconds=0.15, least_rounds=3, patience=2.0, most_rounds=100, warm_ups=1)


def measure(
    calls: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device
) -> dict[str, Timing]:
    """Times calls in turn, one of each a round, so that all see the same machine.

    Args:
        calls: What to time, by name.
        effort: How long.
        device: Awaited before a clock is read.
    """
    for call in calls.values():
        for _ in range(effort.warm_ups):
            _seconds(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(effort.most_rounds):
        limit = effort.seconds if done >= effort.least_rounds else effort.patience
        if done and time.perf_counter() - began >= limit:
            break
        for name, call in calls.items():
            seconds[name].append(_seconds(call, device))
    return {name: summarise(taken) for name, taken in seconds.items()}


def summarise(seconds: list[float]) -> Timing:
    """Returns the quartiles of at least one time."""
    # Quartiles want two numbers; one number twice is its own quartile.
    several = seconds if len(seconds) > 1 else seconds * 2
    lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
    return Timing(lower=lower, median=median, upper=upper, rounds=len(seconds))


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
