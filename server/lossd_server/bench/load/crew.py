"""The processes of callers: started, let loose at one moment, and gathered in."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from lossd_server.bench.load.tally import Tally
from lossd_server.bench.load.worker import Findings, Post, Schedule, main
from lossd_server.errors import LossdError, Reason

_LEAD_SECONDS = 0.2
"""From the signal to the first call: all processes have it by then."""

WARM_UP_SECONDS = 1.0
"""Calls of the first second are not counted: connections are made, and buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrewFindings:
    """What all callers found.

    Attributes:
        tallies: One a kind.
        seconds: How long calls were counted, to the end of the last.
        client_cores: Processor time of the callers a second.
    """

    tallies: dict[str, Tally]
    seconds: float
    client_cores: float


def run_crew(
    posts: Sequence[Post], *, seconds: float, processes: int, on_progress: Callable[[float, int], None]
) -> CrewFindings:
    """Runs callers in processes of their own.

    Args:
        posts: One for each caller.
        seconds: How long calls are counted.
        processes: How many there are at most.
        on_progress: Is told how many seconds are over, and how many calls were made; about twice a second.

    Raises:
        LossdError: A process ended by itself.
    """
    parts = [part for part in (posts[i::processes] for i in range(processes)) if part]
    members = [_Member(part) for part in parts]
    try:
        for member in members:
            member.receive()
        begins = time.monotonic() + _LEAD_SECONDS
        measured_from = begins + WARM_UP_SECONDS
        schedule = Schedule(begins=begins, measured_from=measured_from, ends=measured_from + seconds)
        for member in members:
            member.pipe.send(schedule)
        findings = _gather(members, measured_from, on_progress)
    finally:
        for member in members:
            member.end()
    return _merged(findings, schedule)


class _Member:
    """A process of callers, as its parent sees it."""

    def __init__(self, posts: Sequence[Post]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.calls = 0
        self.pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=main, args=(posts, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> object:
        """Returns what the process says next."""
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise LossdError(Reason.INTERNAL, "a process of callers ended by itself") from error

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def _gather(
    members: Sequence[_Member], measured_from: float, on_progress: Callable[[float, int], None]
) -> list[Findings]:
    findings: list[Findings] = []
    running = {member.pipe: member for member in members}
    while running:
        for pipe in wait(list(running)):
            member = next(member for known, member in running.items() if known is pipe)
            message = member.receive()
            if isinstance(message, Findings):
                findings.append(message)
                del running[member.pipe]
            elif isinstance(message, int):
                member.calls = message
        on_progress(time.monotonic() - measured_from, sum(member.calls for member in members))
    return findings


def _merged(findings: Sequence[Findings], schedule: Schedule) -> CrewFindings:
    tallies: dict[str, Tally] = {}
    for found in findings:
        for kind, tally in found.tallies.items():
            tallies.setdefault(kind, Tally()).add(tally)
    last = max(schedule.ends, *(tally.last for tally in tallies.values()))
    return CrewFindings(
        tallies=tallies,
        seconds=last - schedule.measured_from,
        client_cores=sum(found.cpu_seconds for found in findings) / (last - schedule.begins),
    )
