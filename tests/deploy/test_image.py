"""The image of deploy/Dockerfile: what is in it, and that it serves as the chart runs it."""

import json
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lossd import __version__
from lossd_client import Client, CustomLoss, FocalLoss
from lossd_server.losses import FocalLoss as LocalFocalLoss
from tests.deploy.containers import UID
from tests.deploy.tools import ROOT

ON_A_FREE_PORT = ("serve", "--listen=127.0.0.1:0", "--metrics-port=0")
SLOW = """
import time
from torch import nn

class Slow(nn.Module):
    def forward(self, pred):
        time.sleep(3)
        return pred.sum()
"""

FORBIDDEN = {
    "compilers and linkers": r"bin/(cc|gcc|g\+\+|cpp|clang|ld|as|make|nvcc)(-\d+)?$",
    "installers of Python packages": r"bin/(pip|pip3|easy_install|wheel)$|-packages/pip/",
    "headers and archives": r"/usr/include/.*\.h$|/torch/include/|\.a$",
    "what builds left behind": r"^\./(build|wheels)/|/\.cache/|^\./tmp/.|^\./var/lib/apt/lists/.",
    "what is in no package": r"/\.git/|/tests/deploy/|\.whl$|\.(pem|key|crt)$",
}
ALLOWED = r"/_credentials/roots\.pem$"
"""Public certificates of gRPC's own."""


@pytest.fixture(scope="module")
def server(containers):
    """A container that serves on a free port of this machine, with nothing that it could write to."""
    with containers.running("lossd", *ON_A_FREE_PORT) as container:
        container.wait_for("serving")
        yield container


@pytest.fixture(scope="module")
def address(server):
    return server.wait_for(r"addresses=\['(127\.0\.0\.1:\d+)'\]")[1]


@pytest.fixture(scope="module")
def files(containers):
    """Paths of everything in the image."""
    listing = containers.run_inside("lossd", "find", "/", "-xdev", "-printf", r"%M %U .%p\n", user=0)
    return [line.split(" ", 2) for line in listing.stdout.splitlines()]


def test_it_computes_what_the_local_module_does(address):
    logits = np.random.default_rng(1).standard_normal((2, 80, 25, 30)).astype(np.float32)
    targets = np.random.default_rng(2).integers(-1, 80, (2, 25, 30))
    inputs = torch.from_numpy(logits.copy()).requires_grad_()
    local = LocalFocalLoss()(inputs, torch.from_numpy(targets))
    local.backward()
    with Client(address) as client:
        result = client.compute_loss(FocalLoss(), logits, targets, gradients=True)
        assert client.server_info().version == __version__
    np.testing.assert_allclose(result.loss, local.item(), rtol=1e-7)
    np.testing.assert_array_equal(result.gradients["inputs"], inputs.grad.numpy())


def test_its_kernels_are_loaded_without_a_word(server, address):
    assert "slower" not in server.log()
    mapped = Path(f"/proc/{server.process_id()}/maps").read_text()
    assert re.search(r"/usr/local/lib/\S*liblossd-kernels-\w+\.so", mapped)


def test_metrics_are_served(server):
    port = server.wait_for(r"metrics_port=(\d+)")[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert f'lossd_build_info{{device="cpu ({os.cpu_count()} threads)",version="{__version__}"}} 1.0' in text


def test_process_1_is_the_server_without_any_privilege(server):
    process = Path(f"/proc/{server.process_id()}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["NSpid"].split()[-1] == "1"
    assert (process / "cmdline").read_bytes().split(b"\0")[:3] == [
        b"/opt/lossd/bin/python",
        b"/opt/lossd/bin/lossd",
        b"serve",
    ]


PLACES = ("/", "/opt/lossd", "/srv/lossd", "/tmp", "/run/lossd", "/var/cache/lossd")  # noqa: S108


@pytest.mark.parametrize("place", PLACES)
def test_nothing_can_be_written(server, place):
    done = server.exec("touch", f"{place}/file")
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_checks_of_health_leave_nothing_behind(server, address):
    for _ in range(3):
        assert server.exec("lossd", "health", address).stdout == "SERVING\n"
    states = server.exec("sh", "-c", "cat /proc/[0-9]*/stat").stdout
    assert not re.search(r"^\d+ \(.*\) Z", states, re.MULTILINE)


def test_its_health_check_works_with_its_own_command(containers):
    with containers.running("lossd", options=("--env=LOSSD_INSECURE=true",), network="none") as container:
        container.wait_for(r"serving .*0\.0\.0\.0:50051")
        assert containers.run("podman", "healthcheck", "run", container.name, check=False).returncode == 0
    assert containers.inspect("lossd")["Healthcheck"]["Test"] == ["CMD", "lossd", "health"]


def test_without_a_word_it_is_not_open_to_the_network(containers):
    with containers.running("lossd", network="none") as container:
        assert container.exit_code() == 1
        assert "insecure" in container.log()


def test_it_is_called_through_a_socket_of_a_shared_directory(containers, tmp_path):
    tmp_path.chmod(0o755)
    folder = tmp_path / "run"
    folder.mkdir()
    os.chown(folder, UID, UID)
    options = (f"--volume={folder}:/run/lossd",)
    with containers.running(
        "lossd", "serve", "--listen=unix:/run/lossd/lossd.sock", options=options, network="none"
    ) as container:
        container.wait_for("serving")
        assert container.exec("lossd", "health", "unix:/run/lossd/lossd.sock").returncode == 0
        with Client(f"unix:{folder}/lossd.sock") as client:
            result = client.compute_loss(FocalLoss(), np.zeros((2, 3), np.float32), np.array([0, 1]))
    assert result.loss > 0


def test_sigterm_waits_for_what_runs_and_the_exit_code_is_0(containers, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "slow.py").write_text(SLOW)
    options = (f"--volume={tmp_path}:/srv/lossd:ro",)
    with (
        containers.running("lossd", *ON_A_FREE_PORT, "--load=slow:Slow", options=options) as container,
        ThreadPoolExecutor(1) as pool,
        Client(container.wait_for(r"addresses=\['(127\.0\.0\.1:\d+)'\]")[1]) as client,
    ):
        port = container.wait_for(r"metrics_port=(\d+)")[1]
        call = pool.submit(client.compute_loss, CustomLoss("Slow"), {"pred": np.ones(3, np.float32)})
        wait_for_a_call_in_flight(port)
        container.signal("TERM")
        assert call.result(timeout=60).loss == 3
        assert container.exit_code() == 0
        assert "drained=True" in container.log()


def wait_for_a_call_in_flight(port):
    for _ in range(300):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            if re.search(rb'^lossd_in_flight\{method="ComputeLoss"\} 1', answer.read(), re.MULTILINE):
                return
    raise AssertionError("no call in flight")


def test_sigterm_of_a_server_that_starts_ends_it_too(containers):
    with containers.running("lossd", *ON_A_FREE_PORT, options=("--env=PYTHONVERBOSE=1",)) as container:
        container.wait_for("import 'click'")
        container.signal("TERM")
        assert container.exit_code() == 0
        assert "serving" not in container.log()


def test_any_user_will_do(containers):
    with containers.running("lossd", *ON_A_FREE_PORT, options=("--user=123456:0",)) as container:
        container.wait_for("serving")
        assert "slower" not in container.log()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_there_is_nothing_in_it_that_does_not_serve(files, what):
    found = [
        path for _, _, path in files if re.search(FORBIDDEN[what], path) and not re.search(ALLOWED, path)
    ]
    assert not found


def test_nobody_gains_rights_from_a_file_or_owns_code(files):
    assert not [path for mode, _, path in files if mode[0] == "-" and re.search("[sS]", mode)]
    owned = {path for _, user, path in files if user == str(UID)}
    assert owned == {"./run/lossd", "./var/cache/lossd"}


def test_its_labels_and_settings(containers):
    known = containers.inspect("lossd")["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in known["Labels"].items()}
    assert (labels["title"], labels["version"], labels["licenses"]) == ("lossd", __version__, "Apache-2.0")
    assert (known["User"], known["StopSignal"], known["Entrypoint"]) == ("10001:10001", "SIGTERM", ["lossd"])
    assert set(known["ExposedPorts"]) == {"50051/tcp", "9464/tcp"}
    assert not [
        name for name in known["Env"] if re.search("PROXY|TOKEN|KEY|INDEX|LINKS", name, re.IGNORECASE)
    ]


def test_a_change_of_lossd_is_a_small_layer(containers):
    """Torch and all other packages are in a layer of their own, below that of lossd."""
    history = json.loads(containers.run("podman", "history", "--format=json", "--no-trunc", "lossd").stdout)
    copied = [step["size"] for step in history if "COPY" in step["CreatedBy"]]
    newest, _, dependencies = copied
    assert newest < 4e6
    assert dependencies > 4e8


def test_its_contents_are_printed_by_size(containers):
    script = (ROOT / "deploy/contents.py").read_text()
    printed = containers.run_inside("lossd", "python", "-", stdin=script).stdout
    assert re.search(r"^ +\d+\.\d  torch$", printed, re.MULTILINE)
    assert re.search(r"^ +\d+\.\d  all files, in MB$", printed, re.MULTILINE)
    print(printed)


def test_a_device_that_is_none_fails_the_build_by_name(containers):
    done = containers.build("none", "--build-arg=DEVICE=tpu", check=False)
    assert done.returncode != 0
    assert "DEVICE is 'tpu', want cpu or cuda" in done.stdout + done.stderr
