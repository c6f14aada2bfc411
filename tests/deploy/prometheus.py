"""A Prometheus of its own that scrapes servers under test, and its answers."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, missing

CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prometheus:
    """One that runs.

    Attributes:
        port: Where on the loopback it answers.
    """

    port: int

    def get(self, path: str, **parameters: str) -> Any:
        """What it answers under `/api/v1`; raises where it refuses."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[float]:
        """The values that an expression has now, NaN aside."""
        values = [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]
        return [value for value in values if not math.isnan(value)]


@contextmanager
def scraping(folder: Path, targets: Sequence[str], rules: Any) -> Iterator[Prometheus]:
    """Runs Prometheus by the configuration of compose, with other targets and every second.

    Args:
        folder: Where it keeps its data.
        targets: Metrics endpoints, `host:port`.
        rules: Its rules, as they stand in a file.
    """
    if shutil.which("prometheus") is None:
        missing("no prometheus on this machine: Debian's package prometheus has it")
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    port = _free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            _wait_until_ready(port, process)
            yield Prometheus(port=port)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _free_port() -> int:
    """Prometheus does not tell which port it took, where it is to take any."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("Prometheus is not ready")
