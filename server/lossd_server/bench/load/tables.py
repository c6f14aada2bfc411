"""A report of load as tables, for people."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from lossd_server.bench.load.report import KindResult, LoadReport, Phase
from lossd_server.bench.load.watch import Footprint
from lossd_server.bench.tables import print_line, seconds_text

_LEAST_WIDTH = 132
"""Enough for every column. A narrower terminal breaks the lines itself; rich would cut the numbers."""

_COLUMNS = ("callers", "calls/s", "MB/s", "p50", "p99", "p99.9", "refused", "/s", "p99", "errors", "wrong")


def print_load(console: Console, report: LoadReport) -> None:
    """Prints a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print_line(console, f"{report.date}, {report.target}, {report.cpu_count} cores, {versions}")
    for phase in report.phases:
        console.print()
        for line in _header(phase):
            print_line(console, line)
        console.width = max(console.width, _LEAST_WIDTH)
        console.print(_table(phase))
        for line in _footer(phase):
            print_line(console, line)
    if report.goodput_ratio is not None:
        console.print()
        print_line(console, f"answered under overload: {report.goodput_ratio:.0%} of the peak")


def _header(phase: Phase) -> Iterator[str]:
    rate = phase.offered_per_second
    how = "each calls when it was answered" if rate is None else f"{rate:,.0f} calls/s are due"
    yield f"{phase.name}: {phase.seconds:.1f} s, {how}"


def _table(phase: Phase) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  kind", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in phase.kinds:
        table.add_row(f"  {kind.kind}", *_cells(kind))
    return table


def _cells(kind: KindResult) -> Iterator[str]:
    yield f"{kind.callers}"
    yield f"{kind.calls_per_second:,.1f}"
    yield f"{kind.bytes_per_second / 1e6:,.1f}"
    for seconds in (kind.latencies.p50, kind.latencies.p99, kind.latencies.p999):
        yield _time(seconds)
    yield f"{kind.refused:,}"
    yield f"{kind.refused_per_second:,.1f}"
    yield _time(kind.refused_latencies.p99)
    yield f"{sum(kind.errors.values()):,}"
    yield f"{kind.wrong} of {kind.checked}" if kind.checked else "-"


def _footer(phase: Phase) -> Iterator[str]:
    for kind in phase.kinds:
        for reason, count in {**kind.refusals, **kind.errors}.items():
            yield f"  {kind.kind}: {count:,} {reason}"
    yield f"  callers: {phase.client_cores:.2f} cores"
    if phase.offered_per_second is not None and phase.made_per_second < 0.95 * phase.offered_per_second:
        yield f"  {phase.made_per_second:,.0f} calls/s were made: others were due while all callers waited"
    if phase.server is not None:
        yield from _footprint(phase.server)


def _footprint(held: Footprint) -> Iterator[str]:
    yield (
        f"  server: {held.cores:.2f} cores, {held.rss_before:,.0f} MiB before, {held.rss_first:,.1f} then "
        f"{held.rss_last:,.1f}, {held.rss_peak:,.0f} at most; "
        f"slope {held.rss_slope:+.2f} ± {held.rss_slope_error:.2f} MiB/min"
    )
    for name, (before, most, after) in (("threads", held.threads), ("descriptors", held.descriptors)):
        yield f"  server: {before} {name} before, {most} at most, {after} at the end"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else seconds_text(seconds)
