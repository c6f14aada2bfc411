"""Our counters, gauges and histograms say what those of prometheus_client would."""

import threading
from functools import partial

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from lossd_server.rpc.metrics import BYTES, ITEMS, SECONDS
from lossd_server.rpc.series import Counter, Histogram, Level, note

values = st.one_of(st.sampled_from([*SECONDS, *BYTES, *ITEMS]), st.floats(0, 1e12))


observations = st.lists(st.tuples(st.sampled_from(["a", "b"]), values), max_size=30)


def lines(registry):
    return sorted(line for line in generate_latest(registry).decode().splitlines() if "_created" not in line)


def both_after(ours, theirs, count, observed):
    """Lines of one of our metrics and one of theirs that were told the same."""
    seen = []
    for make in (ours, theirs):
        registry = CollectorRegistry()
        metric = make("x_seconds", "What it says.", ("method",), registry=registry)
        metric.labels("b")
        if make is ours:
            note(*((metric.labels(label), value) for label, value in observed))
        else:
            for label, value in observed:
                count(metric.labels(label), value)
        seen.append(lines(registry))
    return seen


@given(st.sampled_from([SECONDS, BYTES, ITEMS]), observations)
def test_the_same_lines_of_a_histogram(buckets, observed):
    ours, theirs = both_after(
        partial(Histogram, buckets=buckets),
        partial(prometheus_client.Histogram, buckets=buckets),
        prometheus_client.Histogram.observe,
        observed,
    )
    assert ours == theirs


@given(observations)
def test_the_same_lines_of_a_counter(observed):
    ours, theirs = both_after(Counter, prometheus_client.Counter, prometheus_client.Counter.inc, observed)
    assert ours == theirs


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(-1e12, 1e12)), max_size=30))
def test_the_same_lines_of_a_gauge(observed):
    ours, theirs = both_after(Level, prometheus_client.Gauge, prometheus_client.Gauge.inc, observed)
    assert ours == theirs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (partial(Histogram, buckets=(1.0, 2.5)), partial(prometheus_client.Histogram, buckets=(1.0, 2.5))),
        (Counter, prometheus_client.Counter),
        (Level, prometheus_client.Gauge),
    ],
)
def test_without_labels_it_is_there_from_the_start(ours, theirs):
    seen = []
    for make in (ours, theirs):
        registry = CollectorRegistry()
        make("x", "What it says.", registry=registry)
        seen.append(lines(registry))
    assert seen[0] == seen[1]


def test_it_is_found_by_name_and_there_are_no_two_of_one():
    registry = CollectorRegistry()
    note((Counter("x", "What it says.", registry=registry).labels(), 2))
    Level("another", "What it says.", registry=registry)
    found = generate_latest(registry.restricted_registry(["x_total"])).decode()
    assert "x_total 2.0" in found
    assert "another" not in found
    with pytest.raises(ValueError, match="x_total"):
        Counter("x", "What it says.", registry=registry)


def test_nothing_is_lost_between_threads():
    registry = CollectorRegistry()
    series = Histogram("x", "What it says.", ("method",), buckets=(1.0,), registry=registry).labels("a")

    def observe():
        for _ in range(5000):
            note((series, 0.5))

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_sample_value("x_count", {"method": "a"}) == 20_000
    assert registry.get_sample_value("x_sum", {"method": "a"}) == 10_000
