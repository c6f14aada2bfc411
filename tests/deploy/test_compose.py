"""compose.yaml: what it says, and that it runs."""

import contextlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import numpy as np
import pytest
import yaml

from lossd_client import Client, FocalLoss
from lossd_server.config import ServerConfig
from tests.deploy.tools import ROOT, missing

DEPLOY = ROOT / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


@pytest.mark.parametrize("name", FILES)
def test_it_is_valid_by_the_schema_of_compose(name):
    if importlib.util.find_spec("check_jsonschema") is None:
        missing("pip install 'lossd[deploy]'")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema=vendor.compose-spec",
        DEPLOY / name,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_confined_and_for_this_machine_only(service):
    settings = SERVICES[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in settings["ports"])
    assert {"cpus", "mem_limit", "pids_limit"} <= settings.keys()
    assert not {"privileged", "cap_add", "user", "network_mode", "pid", "ipc"} & settings.keys()


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_is_there(service):
    for volume in SERVICES[service].get("volumes", ()):
        source, _, *mode = volume.split(":")
        if source.startswith("."):
            assert (DEPLOY / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


def test_images_of_others_are_pinned():
    assert all(re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"]) for name in ("prometheus", "grafana"))


def test_it_waits_longer_than_the_server_drains():
    seconds = int(SERVICES["lossd"]["stop_grace_period"].removesuffix("s"))
    assert seconds >= ServerConfig().drain_seconds + 10


def test_the_server_and_its_scrape_agree():
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    assert found["names"] == ["lossd"]
    assert found["port"] == ServerConfig().metrics_port
    assert "--metrics-host" in SERVICES["lossd"]["command"]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def project(containers):
    """A function that runs podman-compose on lossd and Prometheus; both are up, and removed at the end."""
    for command in ("netavark", "aardvark-dns", "iptables"):
        if shutil.which(command, path="/usr/lib/podman:/usr/sbin:/usr/bin") is None:
            missing(f"no {command} on this machine")
    if importlib.util.find_spec("podman_compose") is None:
        missing("pip install 'lossd[deploy]'")
    prometheus = SERVICES["prometheus"]["image"]
    containers.run(
        *("buildah", "bud", "--isolation=chroot", "--network=host", "--layers", "--pull-never"),
        *("--file=tests/deploy/prometheus.Dockerfile", f"--tag=docker.io/{prometheus}", "tests/deploy"),
    )
    ports = {"LOSSD_PORT": str(free_port()), "PROMETHEUS_PORT": str(free_port()), "LOSSD_CPUS": "1"}
    containers.environment.update(ports)
    name = f"lossd-{uuid.uuid4().hex[:8]}"

    def run(*arguments, check=True):
        return containers.run(
            *(
                sys.executable,
                "-m",
                "podman_compose",
                f"--project-name={name}",
            ),
            *("--file=deploy/compose.yaml", *arguments),
            check=check,
        )

    try:
        run("up", "--detach", "--no-build", "lossd", "prometheus")
        yield run
    finally:
        run("down", "--volumes", check=False)


def asked(url):
    """Returns the JSON at a URL."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
        return json.load(answer)


def within(seconds, question):
    """Asks until there is an answer."""
    for _ in range(seconds * 5):
        with contextlib.suppress(OSError):  # nobody listens yet
            if answer := question():
                return answer
        time.sleep(0.2)
    raise AssertionError(f"no answer in {seconds} s")


def test_it_serves_this_machine_and_prometheus_sees_it(project, containers):
    with Client(f"127.0.0.1:{containers.environment['LOSSD_PORT']}", timeout=60) as client:
        within(90, client.server_info)
        logits = np.zeros((2, 3), np.float32)
        result = client.compute_loss(FocalLoss(), logits, np.array([0, 1]), gradients=True)
    assert result.gradients["inputs"].shape == (2, 3)
    query = f"http://127.0.0.1:{containers.environment['PROMETHEUS_PORT']}/api/v1/"

    counted = "query?query=grpc_server_handled_total%7Bgrpc_method%3D%22ComputeLoss%22%7D%3E0"
    assert within(90, lambda: asked(query + counted)["data"]["result"])
    assert asked(f"{query}rules")["data"]["groups"]


def test_it_stops_with_all_answered(project, containers):
    project("stop", "lossd")
    listed = json.loads(containers.run("podman", "ps", "--all", "--format=json").stdout)
    (server,) = [container for container in listed if "lossd" in container["Image"].split("/")[-1]]
    assert server["ExitCode"] == 0
    assert "drained=True" in containers.run("podman", "logs", server["Id"]).stderr
