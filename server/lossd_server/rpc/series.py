"""Metrics of what is counted in every call, some at a time; Prometheus reads them as any others.

Those of `prometheus_client` go through four functions and a lock for each of the twenty numbers of a call,
and look through the bounds of a histogram one by one: eight of these were a tenth of a small call's time.
"""

import threading
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf
from typing import ClassVar, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_lock = threading.Lock()
"""For all that is counted anywhere: it is held shortly, and seldom wanted twice at a time."""


class Reading(NamedTuple):
    """What was counted under one set of labels.

    Attributes:
        counts: How many values lie in each bucket, the last without a bound. Where there are no bounds, they
            are not counted.
        total: The sum of all values.
    """

    counts: list[int]
    total: float


class Series:
    """What is counted under one set of labels.

    Args:
        bounds: Upper bounds of the buckets, ascending; what lies on one belongs to it.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def read(self) -> Reading:
        """Returns what was counted so far."""
        with _lock:
            return Reading(self.counts.copy(), self.total)


def note(*values: tuple[Series, float]) -> None:
    """Counts values, each in its series."""
    with _lock:
        for series, value in values:
            if series.bounds:
                series.counts[bisect_left(series.bounds, value)] += 1
            series.total += value


class _Metric(Collector):
    """Series by their labels.

    Args:
        name: Its name, without what Prometheus adds for its kind.
        documentation: What it says.
        labels: Names of its labels; without any, its one series is there from the start.
        buckets: Upper bounds of its buckets, ascending.
        registry: Where it is collected.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = (),
        registry: CollectorRegistry,
    ) -> None:
        self._about = name, documentation
        self._labels = labels
        self._buckets = tuple(buckets)
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """Returns the series of these labels, which begins to be collected now."""
        return self._series.get(values) or self._series.setdefault(values, Series(self._buckets))

    def describe(self) -> Iterator[Metric]:
        """Yields what is collected, without any series."""
        yield self._family({})

    def collect(self) -> Iterator[Metric]:
        """Yields all series."""
        yield self._family({values: series.read() for values, series in list(self._series.items())})

    @abstractmethod
    def _family(self, readings: dict[tuple[str, ...], Reading]) -> Metric:
        """Returns what was read as Prometheus knows it."""


class Histogram(_Metric):
    """How many values were up to each bound, and their sum."""

    def _family(self, readings: dict[tuple[str, ...], Reading]) -> Metric:
        bounds = [floatToGoString(bound) for bound in (*self._buckets, inf)]  # type: ignore[no-untyped-call]
        family = HistogramMetricFamily(*self._about, labels=self._labels)
        for values, (counts, total) in readings.items():
            family.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
        return family


class _Sum(_Metric):
    """The sum of all values."""

    _kind: ClassVar[type[CounterMetricFamily | GaugeMetricFamily]]

    def _family(self, readings: dict[tuple[str, ...], Reading]) -> Metric:
        family = self._kind(*self._about, labels=self._labels)
        for values, (_, total) in readings.items():
            family.add_metric(values, total)
        return family


class Counter(_Sum):
    """What only grows. When it began to is not told (`_created`)."""

    _kind = CounterMetricFamily


class Level(_Sum):
    """What grows and shrinks: a gauge."""

    _kind = GaugeMetricFamily
