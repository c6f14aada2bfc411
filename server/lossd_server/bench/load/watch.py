"""What a process holds over time: memory, threads, descriptors."""

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_SECONDS = 0.5
_PARTS = 12
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a process holds at one moment.

    Attributes:
        when: On the clock of `time.monotonic`, seconds.
        rss_bytes: Resident memory.
        threads: How many it has.
        descriptors: Open files and sockets.
        cpu_seconds: Processor time since it began.
    """

    when: float
    rss_bytes: int
    threads: int
    descriptors: int
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a process held over a run.

    Attributes:
        rss_before: Resident memory before the first call, MiB.
        rss_first: The same, mean over the second sixth of the run, once all kinds had come.
        rss_last: Mean over the last sixth.
        rss_peak: The most of it.
        rss_slope: How it grew from there to the end, by least squares, MiB a minute.
        rss_slope_error: Standard error of that, by the means of twelve parts of that time: one sample is much
            like the one before it.
        threads: Before, at most, and at the end.
        descriptors: The same, of open files and sockets.
        cores: Processor time a second.
    """

    rss_before: float
    rss_first: float
    rss_last: float
    rss_peak: float
    rss_slope: float
    rss_slope_error: float
    threads: tuple[int, int, int]
    descriptors: tuple[int, int, int]
    cores: float


def sample(pid: int) -> Sample:
    """Looks at a process.

    Raises:
        OSError: There is none of that number, or the system has no `/proc`.
    """
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text("utf-8").splitlines())
    # The name, in brackets, may hold anything; times are the 14th and 15th field.
    ticks = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()[11:13]
    return Sample(
        when=time.monotonic(),
        rss_bytes=int(status["VmRSS"].split()[0]) * 1024,
        threads=int(status["Threads"]),
        descriptors=sum(1 for _ in (folder / "fd").iterdir()),
        cpu_seconds=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


@contextmanager
def watching(pid: int) -> Iterator[list[Sample]]:
    """Yields a list that is filled with samples of a process until the end of the context."""
    samples: list[Sample] = [sample(pid)]
    done = threading.Event()

    def watch() -> None:
        try:
            while not done.wait(_INTERVAL_SECONDS):
                samples.append(sample(pid))
        except (OSError, KeyError):  # it is gone
            return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def footprint(samples: Sequence[Sample]) -> Footprint:
    """Returns what samples come to; there is one at least."""
    warm = samples[len(samples) // 6 :]
    minutes = [one.when / 60 for one in warm]
    memory = [one.rss_bytes / _MEBIBYTE for one in warm]
    sixth = max(len(samples) // 6, 1)
    slope, error = _line(_means(minutes), _means(memory))
    return Footprint(
        rss_before=samples[0].rss_bytes / _MEBIBYTE,
        rss_first=statistics.fmean(memory[:sixth]),
        rss_last=statistics.fmean(memory[-sixth:]),
        rss_peak=max(one.rss_bytes for one in samples) / _MEBIBYTE,
        rss_slope=slope,
        rss_slope_error=error,
        threads=_ends([one.threads for one in samples]),
        descriptors=_ends([one.descriptors for one in samples]),
        cores=_cores(samples[0], samples[-1]),
    )


def _ends(numbers: Sequence[int]) -> tuple[int, int, int]:
    return numbers[0], max(numbers), numbers[-1]


def _cores(first: Sample, last: Sample) -> float:
    return (last.cpu_seconds - first.cpu_seconds) / max(last.when - first.when, 1e-9)


def _means(numbers: Sequence[float]) -> list[float]:
    """Returns the means of so many parts in a row."""
    size = max(len(numbers) // _PARTS, 1)
    return [statistics.fmean(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns the slope of the line through points, and its standard error; 0 for too few of them."""
    if len(x) < 3:
        return 0.0, 0.0
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    spread = sum((a - mean) ** 2 for a in x)
    return slope, (rest / (len(x) - 2) / spread) ** 0.5
