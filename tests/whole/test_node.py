"""Another language over plain protobuf: Node as a caller of lossd, and as a server to its client."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from lossd_client import Client, FocalLoss, InvalidInputError
from tests.client.support import same_bits
from tests.whole.test_readme import ROOT, blocks

NODE = Path(__file__).parent / "node"
MEBIBYTE = 1 << 20


def missing(why):
    """Skips a test, except in CI, where what is missing is an error."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment of a Node that finds gRPC and the contract."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            missing(f"no {command} on this machine")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NODE / name, folder)
    quietly = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=60000"]
    command = ["npm", "ci", *quietly]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        missing(f"npm cannot install {NODE / 'package.json'}: {'; '.join(done.stderr.splitlines()[:3])}")
    protos = f"{ROOT / 'proto'}:{Path(error_details_pb2.__file__).parents[2]}"  # ours, and google.rpc's
    return {**os.environ, "NODE_PATH": str(folder / "node_modules"), "PROTO_PATH": protos}


@pytest.fixture
def node(environment):
    """A function that runs Node and returns what it prints."""

    def run(*arguments):
        command = [shutil.which("node"), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@contextmanager
def serving(environment):
    """Yields the address of a server in Node."""
    process = subprocess.Popen(
        [shutil.which("node"), NODE / "server.js"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        port = process.stdout.readline().strip()
        assert port, process.communicate(timeout=30)[1]
        yield f"127.0.0.1:{port}"
    finally:
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def foreign(environment):
    """A client of a server in Node."""
    with serving(environment) as address, Client(address) as client:
        yield client


def arrays(*shape):
    rng = np.random.default_rng(len(shape))
    return rng.standard_normal(shape, np.float32), rng.integers(-1, shape[1], (shape[0], *shape[2:]))


def large():
    found = arrays(16, 80, 100, 103)
    assert found[0].nbytes > 50 * MEBIBYTE
    return found


def keep(folder, inputs, targets):
    for name, array in (("inputs", inputs), ("targets", targets)):
        (folder / f"{name}.bin").write_bytes(array.tobytes())
        (folder / f"{name}.json").write_text(json.dumps(array.shape))


def test_the_example_of_the_readme(node, address, tmp_path):
    example = tmp_path / "example.js"
    example.write_text(blocks("js")[0].replace("localhost:50051", address))
    loss, gradient = node(example).split(maxsplit=1)
    inputs = np.array([[2, -1, 0], [0.5, 1, -2]], np.float32)
    with Client(address) as client:
        expected = client.compute_loss(FocalLoss(), inputs, np.array([0, -1]), gradients=True)
    assert np.float32(loss) == expected.loss
    found = bytes.fromhex(gradient.strip().removeprefix("<Buffer").removesuffix(">"))
    assert found == expected.gradients["inputs"].tobytes()


@pytest.mark.parametrize("form", ["plain", "odd", "chunks"])
def test_node_sends_50_mib_and_gets_50_mib(node, address, tmp_path, form):
    inputs, targets = large()
    keep(tmp_path, inputs, targets)
    node(NODE / "client.js", address, form, tmp_path)
    with Client(address) as client:
        expected = client.compute_loss(FocalLoss(), inputs, targets, gradients=True)
    assert (tmp_path / "loss.out").read_bytes() == expected.loss.tobytes()
    assert (tmp_path / "gradient.out").read_bytes() == expected.gradients["inputs"].tobytes()


def test_node_reads_why_it_was_refused(node, address, tmp_path):
    inputs, targets = arrays(4, 3)
    targets[2] = 80
    keep(tmp_path, inputs, targets)
    found = json.loads(node(NODE / "client.js", address, "refused", tmp_path))
    assert found["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (found["ErrorInfo"]["domain"], found["ErrorInfo"]["reason"]) == ("lossd", "LABEL_OUT_OF_RANGE")
    assert found["ErrorInfo"]["metadata"]["value"] == "80"
    (violation,) = found["BadRequest"]["field_violations"]
    assert violation["field"] == "items[0].focal.targets"
    assert violation["description"] in found["message"]


def test_node_has_many_requests_on_a_stream(node, address, tmp_path):
    inputs, targets = arrays(4, 3)
    keep(tmp_path, inputs, targets)
    lines = node(NODE / "client.js", address, "stream", tmp_path).splitlines()
    found = {answer.pop("id"): answer for answer in map(json.loads, lines)}
    assert found.keys() == set(range(1, 9))
    assert found.pop(3)["reason"] == "ERROR_REASON_INVALID_OPTION"
    with Client(address) as client:
        for gamma, answer in found.items():
            expected = client.compute_loss(FocalLoss(gamma=gamma), inputs, targets, gradients=True)
            assert base64.b64decode(answer["value"]) == expected.gradients["inputs"].tobytes()


@pytest.mark.parametrize("make", [large, lambda: arrays(4, 3)], ids=["50 MiB", "small"])
def test_the_client_reads_what_another_server_writes(foreign, make):
    inputs, targets = make()
    result = foreign.compute_loss(FocalLoss(), inputs, targets, gradients=True)
    assert result.loss == inputs.flat[0]
    assert same_bits(result.gradients["inputs"], inputs)
    assert (result.positive_count, result.timings["compute"]) == (5, 7e-6)


def test_the_client_reads_why_another_server_refused(foreign):
    with pytest.raises(InvalidInputError, match="is 9") as caught:
        foreign.compute_loss(FocalLoss(gamma=9), *arrays(4, 3))
    assert (caught.value.reason, caught.value.field) == ("INVALID_OPTION", "focal.gamma")
    assert caught.value.value == "9"


def test_the_client_puts_the_answers_of_another_server_in_order(foreign):
    items = [arrays(4, 3 + k) for k in range(7)]
    results = foreign.compute_loss_stream(FocalLoss(), items, gradients=True, window=7)
    for result, (inputs, _) in zip(results, items, strict=True):
        assert same_bits(result.gradients["inputs"], inputs)
