"""A real Prometheus reads real servers: every query of the dashboard and of the rules finds something."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lossd_server.engine import resources
from lossd_server.rpc import Server, server
from tests.deploy.prometheus import scraping
from tests.deploy.tools import ROOT
from tests.deploy.traffic import traffic
from tests.service.support import make_server
from tests.whole.conftest import LOSSD

FILES = ROOT / "deploy" / "helm" / "lossd" / "files"
QUERIES = sorted(
    {
        target["expr"]
        for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]
        for target in panel.get("targets", ())
    }
)
VARIABLES = {
    "$__rate_interval": "10s",
    "$namespace": ".*",
    "$job": "lossd",
    "$instance": ".*",
    "$method": ".*",
}
NOISY = Path(__file__).parents[1] / "whole"
GPU = {"allocated": 1 << 30, "reserved": 2 << 30, "free": 60 << 30, "total": 80 << 30}


def without_thresholds():
    """The rules, with alerts whose expressions only say what they look at, and which fire at once."""
    rules = yaml.safe_load((FILES / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
            rule["expr"] = looked_at(rule["expr"])
    return rules


def looked_at(expression):
    """An alert's expression without its thresholds, and without what silences it."""
    if expression.startswith("absent("):
        return expression.removeprefix("absent")
    return re.sub(r"(>|<|==)\s*[\d.]+", "", expression).partition("unless")[0]


def filled_in(expression: str, job: str = "lossd") -> str:
    """A query as Grafana sends it."""
    for variable, value in {**VARIABLES, "$job": job}.items():
        expression = expression.replace(variable, value)
    return expression


def eventually(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.5)


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[int]:
    """Yields the metrics port of a `lossd serve` whose log is a file."""
    log = folder / "lossd.log"
    command = [*LOSSD, "serve", "--metrics-port", "0", "--log-format", "json", *options]
    with log.open("w") as file, subprocess.Popen(command, stderr=file, cwd=NOISY) as process:
        try:
            eventually(lambda: '"serving"' in log.read_text() or process.poll() is not None)
            yield next(line["metrics_port"] for line in _lines(log) if line["event"] == "serving")
        finally:
            process.terminate()
            process.wait(timeout=30)


def _lines(log: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, log.read_text().splitlines()))


@pytest.fixture(scope="module")
def with_a_gpu(tmp_path_factory):
    """A server that believes to have a GPU, and a limit of memory."""
    limit = tmp_path_factory.mktemp("cgroup") / "memory.max"
    limit.write_text(str(8 << 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "device_memory", lambda _device: GPU)
        patch.setattr(resources, "_MEMORY_V2", limit)
        with make_server() as running:
            yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, with_a_gpu: Server):
    """Scrapes a `lossd serve` and a server in this process, both of which are called all the time."""
    folder = tmp_path_factory.mktemp("prometheus")
    socket = f"unix:{folder / 'lossd.sock'}"
    with (
        serve(folder, "--listen", socket, "--load", "noisy:Noisy") as port,
        traffic(socket, with_a_gpu.addresses[0]),
        scraping(
            folder, [f"127.0.0.1:{p}" for p in (port, with_a_gpu.metrics_port)], without_thresholds()
        ) as running,
    ):
        eventually(lambda: running.query("count(lossd_build_info)") == [2])
        yield running


@pytest.mark.parametrize("expression", QUERIES)
def test_a_query_of_the_dashboard_finds_something(prometheus, expression):
    eventually(lambda: prometheus.query(filled_in(expression)) != [])


def test_every_rule_is_evaluated_and_every_alert_has_something_to_look_at(prometheus):
    wanted = [rule for group in without_thresholds()["groups"] for rule in group["rules"]]

    def idle():
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == len(wanted)
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, rules
        alerts = [rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] != "firing"]
        records = [rule["record"] for rule in wanted if "record" in rule]
        return alerts + [name for name in records if not prometheus.query(name)]

    eventually(lambda: idle() == [])


def test_texts_of_alerts_fill_in(prometheus):
    eventually(lambda: len(prometheus.get("alerts")["alerts"]) > 0)
    for alert in prometheus.get("alerts")["alerts"]:
        for text in alert["annotations"].values():
            assert not re.search(r"error expanding|no value|%!|\{\{", text), alert


def test_a_query_about_servers_that_are_not_there_is_valid_and_finds_nothing_or_zero(prometheus):
    for expression in QUERIES:
        assert set(prometheus.query(filled_in(expression, job="nobody"))) <= {0.0}, expression
