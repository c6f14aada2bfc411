"""The rendered settings, served: a server of them on this machine, asked as callers and probes would."""

import os
import re
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_client import Client, FocalLoss
from tests.certificates import Authority
from tests.deploy.objects import pod_spec, server, settings
from tests.whole.conftest import LOSSD

LOGITS, TARGETS = np.zeros((32, 80, 20, 20), np.float32), np.zeros((32, 20, 20), np.int64)
TOKEN = "correct-horse-battery"  # noqa: S105  # of this test


@pytest.fixture
def place(tmp_path):
    """A function that puts what stands for a pod's file system into a folder of the test."""

    def put(text):
        for folder in ("/etc/lossd", "/run/lossd"):
            text = text.replace(folder, f"{tmp_path}{folder}")
        return re.sub(r'"0\.0\.0\.0:\d+"', '"127.0.0.1:0"', text).replace("9464", "0")

    for folder in ("etc/lossd/tls", "etc/lossd/tokens", "run/lossd"):
        (tmp_path / folder).mkdir(parents=True)
    return put


@contextmanager
def served(objects, place, folder):
    """Yields the address of a server of the rendered settings, if it has one, and ends it with SIGTERM."""
    toml = folder / "lossd.toml"
    toml.write_text(place(settings(objects)))
    command = [*LOSSD, "serve", "--config", str(toml), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if '"serving"' in line)
        found = re.search(r"127\.0\.0\.1:\d+", line)
        yield found and found[0]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def probe(objects, place, name):
    """Runs the command of a rendered probe and returns its exit code."""
    _, *arguments = server(objects)[name]["exec"]["command"]
    command = [*LOSSD, *map(place, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def test_plain_settings_serve(rendered, place, tmp_path):
    with served(rendered("default"), place, tmp_path) as address, Client(address) as client:
        assert client.compute_loss(FocalLoss(), LOGITS, TARGETS).loss > 0


def put_secret(folder):
    """Writes what the Secrets hold, and returns the authority that signed the certificate."""
    authority = Authority(folder, "authority")
    tls = folder / "etc/lossd/tls"
    pair = authority.issue()
    for name, source in {"tls.crt": pair.cert, "tls.key": pair.key, "ca.crt": authority.path}.items():
        (tls / name).write_bytes(Path(source).read_bytes())
    (folder / "etc/lossd/tokens/tokens.toml").write_text(f'[trainer]\ntoken = "{TOKEN}"\n')
    return authority


@pytest.mark.parametrize("case", ["tls", "mtls-tokens"])
def test_tls_is_served_and_probed(rendered, place, tmp_path, case):
    authority = put_secret(tmp_path)
    key, certificate = authority.issue().bytes()
    with served(rendered(case), place, tmp_path) as address:
        known = grpc.ssl_channel_credentials(authority.pem, key, certificate)
        with grpc.secure_channel(address, known) as channel:
            with_token = {"timeout": 20, "metadata": [("authorization", f"Bearer {TOKEN}")]}
            assert LossServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), **with_token).version
            call = LossServiceStub(channel).GetServerInfo.future(pb.GetServerInfoRequest(), timeout=20)
            assert call.code().name == ("OK" if case == "tls" else "UNAUTHENTICATED")
        anyone = grpc.ssl_channel_credentials(authority.pem)
        with grpc.secure_channel(address, anyone) as channel:
            call = LossServiceStub(channel).GetServerInfo.future(pb.GetServerInfoRequest(), timeout=20)
            assert (call.exception() is None) == (case == "tls")
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe(rendered(case), place, name) == 0
    assert probe(rendered(case), place, "livenessProbe") == 1


def test_a_trainer_shares_memory_with_its_sidecar(rendered, place, tmp_path):
    objects = rendered("sidecar")
    (trainer,) = pod_spec(objects)["containers"]
    target = place({variable["name"]: variable["value"] for variable in trainer["env"]}["LOSSD_TARGET"])
    with served(objects, place, tmp_path), Client(target) as client:
        assert client.server_info().max_shared_bytes == 2 << 30
        logits = client.allocate(LOGITS.shape)
        logits[...] = LOGITS
        gradient = client.compute_loss(FocalLoss(), logits, TARGETS, gradients=True).gradients["inputs"]
        assert np.isfinite(gradient).all()
        assert any("memfd" in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert probe(objects, place, "startupProbe") == 0
        mode = os.stat(target.removeprefix("unix://")).st_mode  # noqa: PTH116
        assert mode & 0o077 == 0
