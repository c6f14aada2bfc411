"""A process of callers; several of them, since Python's lock lets one process use one core."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from lossd_server.bench.load.callers import Target, run_caller
from lossd_server.bench.load.pace import Pace
from lossd_server.bench.load.tally import Tally

REPORT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """What one caller is to do.

    Attributes:
        target: What it calls.
        interval: See `Pace`.
        offset: How long after the others' beginning its first call is due, seconds.
    """

    target: Target
    interval: float | None
    offset: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When all callers begin, when calls count, and when it ends, as `time.monotonic` has it."""

    begins: float
    measured_from: float
    ends: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a process of callers found: a tally a kind, and the processor time that it took."""

    tallies: Mapping[str, Tally]
    cpu_seconds: float


def main(posts: Sequence[Post], pipe: Connection) -> None:
    """Tells the parent that it is there, gets the schedule, tells how many calls were made, then all."""
    pipe.send(None)
    schedule: Schedule = pipe.recv()
    tallies = [Tally(measured_from=schedule.measured_from) for _ in posts]
    began = time.process_time()
    threads = [
        threading.Thread(target=run_caller, args=(post.target, _pace(post, schedule), tally), daemon=True)
        for post, tally in zip(posts, tallies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(REPORT_SECONDS)
            pipe.send(sum(tally.calls for tally in tallies))
    merged: dict[str, Tally] = {}
    for post, tally in zip(posts, tallies, strict=True):
        merged.setdefault(post.target.kind, Tally()).add(tally)
    pipe.send(Findings(tallies=merged, cpu_seconds=time.process_time() - began))


def _pace(post: Post, schedule: Schedule) -> Pace:
    return Pace(begins=schedule.begins + post.offset, ends=schedule.ends, interval=post.interval)
