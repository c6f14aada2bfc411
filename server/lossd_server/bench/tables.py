"""A report as tables, for people."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lossd_server.bench.report import CaseResult, PathResult, Report

_LEAST_WIDTH = 132
"""Enough for every column. A narrower terminal breaks the lines itself; rich would cut the numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """A column: its heading, and its text for a path of a case (now, and in the earlier run)."""

    heading: str
    text: Callable[[CaseResult, PathResult, PathResult | None], str]


def print_report(console: Console, report: Report, earlier: Report | None = None) -> None:
    """Prints a report, beside an earlier one where there is one."""
    for line in _header(report, earlier):
        print_line(console, line)
    for case in report.cases:
        console.print()
        print_line(console, f"{case.name}: {case.title}")
        with _wide(console):
            console.print(_table(case, earlier))


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is: not coloured, not wrapped, brackets no markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def seconds_text(seconds: float) -> str:
    """Returns a time with three digits, e.g. `1.23 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


@contextmanager
def _wide(console: Console) -> Iterator[None]:
    width = console.width
    console.width = max(width, _LEAST_WIDTH)
    try:
        yield
    finally:
        console.width = width


def _header(report: Report, earlier: Report | None) -> Iterator[str]:
    here = report.environment
    yield f"{here.date} on {here.device}, {here.cpu_count} cores, torch with {here.threads} threads"
    yield ", ".join(f"{name} {version}" for name, version in here.versions.items())
    if here.tuned_malloc:
        yield "malloc thresholds raised for every path alike (freed memory is kept: no page faults in any)"
    else:
        yield "malloc as it is: these times hold page faults"
    yield "time: median of calls in a row, paths in turn; spread: between the quartiles, of the median"
    yield "first: median of the first of each row, when other paths have had the caches; -: time is of such"
    yield "peak: memory of this process beyond what was in use before, results included"
    yield "errors: relative, in the 2-norm, against float64 (assign: labels and targets against all-pairs)"
    if any(path.gpu_seconds is not None for case in report.cases for path in case.paths):
        yield "GPU: from its first command to its last, all given before; eager and module wait on the way"
    if earlier is not None:
        yield f"before: {earlier.environment.date} on {earlier.environment.device}"


def _table(case: CaseResult, earlier: Report | None) -> Table:
    before = None if earlier is None else earlier.case(case.name)
    columns = list(_columns(case, compared=earlier is not None))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  path", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for path in case.paths:
        old = None if before is None else before.path(path.name)
        table.add_row(f"  {path.name}", *(column.text(case, path, old) for column in columns))
    return table


def _columns(case: CaseResult, *, compared: bool) -> Iterator[_Column]:
    yield _Column(heading="time", text=lambda _case, path, _old: seconds_text(path.median))
    yield _Column(heading="spread", text=lambda _case, path, _old: _spread(path))
    yield _Column(heading=f"{case.base} / it", text=lambda case, path, _old: _faster(case, path))
    yield _Column(heading="first", text=lambda _case, path, _old: _first(path))
    if case.path("copy") is not None:
        yield _Column(heading="it / copy", text=lambda case, path, _old: _above_copy(case, path))
    if any(path.gpu_seconds is not None for path in case.paths):
        yield _Column(heading="GPU", text=lambda _case, path, _old: _gpu_time(path))
        yield _Column(heading="GPU / copy", text=lambda case, path, _old: _gpu_above_copy(case, path))
    yield _Column(heading="peak", text=lambda _case, path, _old: _bytes(path.peak_bytes))
    value, others = ("labels", "targets") if case.base == "all-pairs" else ("value err", "grad err")
    yield _Column(heading=value, text=lambda _case, path, _old: _error(path.value_error))
    yield _Column(heading=others, text=lambda _case, path, _old: _error(path.gradient_error))
    if compared:
        yield _Column(heading="before", text=lambda _case, _path, old: _before(old))
        yield _Column(heading="before / it", text=lambda _case, path, old: _ratio(old, path))


def _spread(path: PathResult) -> str:
    return f"{(path.upper - path.lower) / path.median:.0%}" if path.median else "-"


def _first(path: PathResult) -> str:
    return "-" if path.first is None else seconds_text(path.first)


def _faster(case: CaseResult, path: PathResult) -> str:
    return _ratio(case.path(case.base), path)


def _above_copy(case: CaseResult, path: PathResult) -> str:
    floor = case.path("copy")
    return "-" if floor is None else _ratio(path, floor)


def _gpu_time(path: PathResult) -> str:
    return "-" if path.gpu_seconds is None else seconds_text(path.gpu_seconds)


def _gpu_above_copy(case: CaseResult, path: PathResult) -> str:
    floor = case.path("copy")
    if floor is None or not floor.gpu_seconds or path.gpu_seconds is None:
        return "-"
    return f"{_digits(path.gpu_seconds / floor.gpu_seconds)}x"


def _ratio(dividend: PathResult | None, divisor: PathResult) -> str:
    return "-" if dividend is None or not divisor.median else f"{_digits(dividend.median / divisor.median)}x"


def _before(path: PathResult | None) -> str:
    return "-" if path is None else seconds_text(path.median)


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def _error(error: float | None) -> str:
    return "-" if error is None else "0" if error == 0 else f"{error:.1e}"


def _digits(number: float) -> str:
    """Returns a positive number with three digits, all of those before the point."""
    decimals = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{decimals}f}"
