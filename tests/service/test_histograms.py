"""Our histograms say what those of prometheus_client would."""

import threading

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from lossd_server.rpc.histograms import Histogram
from lossd_server.rpc.metrics import BYTES, ITEMS, SECONDS

values = st.one_of(st.sampled_from([*SECONDS, *BYTES, *ITEMS]), st.floats(0, 1e12))


def lines(registry):
    return sorted(line for line in generate_latest(registry).decode().splitlines() if "_created" not in line)


@given(
    st.sampled_from([SECONDS, BYTES, ITEMS]),
    st.lists(st.tuples(st.sampled_from(["a", "b"]), values), max_size=30),
)
def test_the_same_lines(buckets, observed):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    with_ours = Histogram("x_seconds", "What it says.", ("method",), buckets=buckets, registry=ours)
    with_theirs = prometheus_client.Histogram(
        "x_seconds", "What it says.", ("method",), buckets=buckets, registry=theirs
    )
    for histogram in (with_ours, with_theirs):
        histogram.labels("b")
        for label, value in observed:
            histogram.labels(label).observe(value)
    assert lines(ours) == lines(theirs)


def test_without_labels_it_is_there_from_the_start():
    seen = []
    for kind in (Histogram, prometheus_client.Histogram):
        registry = CollectorRegistry()
        histogram = kind("x", "What it says.", buckets=(1.0, 2.5), registry=registry)
        before = lines(registry)
        histogram.observe(2.5)
        seen.append((before, lines(registry)))
    assert seen[0] == seen[1]


def test_nothing_is_lost_between_threads():
    registry = CollectorRegistry()
    series = Histogram("x", "What it says.", ("method",), buckets=(1.0,), registry=registry).labels("a")

    def observe():
        for _ in range(5000):
            series.observe(0.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_sample_value("x_count", {"method": "a"}) == 20_000
    assert registry.get_sample_value("x_sum", {"method": "a"}) == 10_000
