"""Drives a load: starts a server or takes one, sends the callers, and prints what they found."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from lossd_server.bench.load.callers import Target
from lossd_server.bench.load.crew import run_crew
from lossd_server.bench.load.mix import Share, read_mix
from lossd_server.bench.load.report import LoadReport, Phase, phase, report, to_json
from lossd_server.bench.load.serving import Served, serve
from lossd_server.bench.load.tables import print_load
from lossd_server.bench.load.targets import make_target
from lossd_server.bench.load.watch import footprint, watching
from lossd_server.bench.load.worker import Post
from lossd_server.bench.tables import print_line

_LINE_SECONDS = 10.0
"""How often progress is a line of its own where there is no terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """What load is wanted.

    Attributes:
        mix: Kinds and callers; see `read_mix`.
        concurrency: Callers in all; None takes those of the mix.
        seconds: How long each phase is counted.
        rate: Calls a second over all callers, whenever they are answered; None calls again when
            answered.
        overload: After a first phase, offers so many times what was answered in it; None leaves it out.
        target: Address of a server; None starts one.
        device: Where one that is started evaluates.
        processes: Of callers, at most.
        timeout: After which a call is given up, seconds.
    """

    mix: str = "assign:8,focal-s:4,focal-m:1"
    concurrency: int | None = None
    seconds: float = 10.0
    rate: float | None = None
    overload: float | None = None
    target: str | None = None
    device: str = "auto"
    processes: int = os.cpu_count() or 1
    timeout: float = 60.0


def run(settings: LoadSettings, console: Console, json_path: Path | None = None) -> LoadReport:
    """Drives a load, prints tables, and writes JSON.

    Raises:
        LossdError: The mix is none, the server does not start, or nobody answers at the target.
        OSError: The report cannot be written.
    """
    shares = read_mix(settings.mix, settings.concurrency)
    date = datetime.now(UTC)
    with ExitStack() as resources:
        served = _served(settings, resources)
        targets = {
            share.kind: make_target(share.kind, served, settings.timeout, resources) for share in shares
        }
        phases = list(_phases(shares, targets, served, settings, console))
    found = report(settings.target or f"lossd serve --device {settings.device}", phases, date)
    print_load(console, found)
    if json_path is not None:
        json_path.write_text(to_json(found), encoding="utf-8")
    return found


def _served(settings: LoadSettings, resources: ExitStack) -> Served:
    if settings.target is None:
        return resources.enter_context(serve(settings.device))
    unix = settings.target if settings.target.startswith("unix:") else None
    return Served(address=settings.target, unix_address=unix)


def _phases(
    shares: Sequence[Share],
    targets: dict[str, Target],
    served: Served,
    settings: LoadSettings,
    console: Console,
) -> Iterator[Phase]:
    rates = _even_rates(shares, settings.rate)
    name = "load" if settings.overload is None else "peak"
    first = _phase(name, shares, rates, targets, served, settings, console)
    yield first
    if settings.overload is None:
        return
    more = tuple(replace(share, callers=round(share.callers * settings.overload)) for share in shares)
    offered = {kind.kind: kind.calls_per_second * settings.overload for kind in first.kinds}
    yield _phase("overload", more, offered, targets, served, settings, console)


def _even_rates(shares: Sequence[Share], rate: float | None) -> dict[str, float]:
    """Returns the calls a second of each kind, the same for each caller; none for no rate."""
    callers = sum(share.callers for share in shares)
    return {} if rate is None else {share.kind: rate * share.callers / callers for share in shares}


def _phase(
    name: str,
    shares: Sequence[Share],
    rates: dict[str, float],
    targets: dict[str, Target],
    served: Served,
    settings: LoadSettings,
    console: Console,
) -> Phase:
    posts = [post for share in shares for post in _posts(share, targets[share.kind], rates.get(share.kind))]
    with ExitStack() as resources:
        samples = None if served.pid is None else resources.enter_context(watching(served.pid))
        progress = resources.enter_context(_progress(console, name, settings.seconds))
        found = run_crew(posts, seconds=settings.seconds, processes=settings.processes, on_progress=progress)
    held = None if samples is None else footprint(samples)
    return phase(name, shares, found, offered=sum(rates.values()) if rates else None, server=held)


def _posts(share: Share, target: Target, rate: float | None) -> list[Post]:
    """Returns what the callers of a kind are to do; at a rate, one after the other within an interval."""
    interval = None if rate is None else share.callers / max(rate, 1e-3)
    offsets = [0.0 if interval is None else i * interval / share.callers for i in range(share.callers)]
    return [Post(target=target, interval=interval, offset=offset) for offset in offsets]


@contextmanager
def _progress(console: Console, name: str, seconds: float) -> Iterator[Callable[[float, int], None]]:
    """Yields what shows how far a phase is: in place on a terminal, elsewhere in a line now and then."""

    def text(past: float, calls: int) -> str:
        return f"{name}: {max(past, 0):.0f} of {seconds:.0f} s, {calls:,} calls"

    if console.is_terminal:
        with console.status(name) as status:
            yield lambda past, calls: status.update(text(past, calls))
        return
    due = _LINE_SECONDS

    def show(past: float, calls: int) -> None:
        nonlocal due
        if past >= due:
            due += _LINE_SECONDS
            print_line(console, text(past, calls))

    yield show
