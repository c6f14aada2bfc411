"""Reads the metrics of a live server."""

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from lossd_server.rpc import Server


def scrape(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
        return answer.read().decode()


def samples(server: Server) -> list[tuple[str, dict[str, str], float]]:
    """Every sample as (name, labels, value)."""
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(scrape(server))
        for sample in family.samples
    ]


def value(server: Server, wanted: str, **labels: str) -> float:
    """The sum of a metric over all samples that have these labels."""
    return sum(v for name, has, v in samples(server) if name == wanted and has.items() >= labels.items())


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until something holds: counters are written after the answer was sent."""
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)
