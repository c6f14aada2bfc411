"""Pods of the rendered chart, really run by podman: they start, serve, share memory and drain.

Podman is no kubelet. What it lacks is taken from the manifests here and nothing else: ports (there is nothing
to map on the host's network), restarts, and sidecars, which become containers of the pod. It passes over
gRPC probes, preStop, grace periods and scheduling.
"""

import json
import re
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

from lossd_client import Client, FocalLoss, LossdError
from tests.deploy.objects import of_kind, pod_spec, quantity, server, workload

IMAGE = "image.repository=localhost/lossd,image.tag=latest,image.pullPolicy=Never"
LOGITS, TARGETS = np.zeros((4, 80, 40, 40), np.float32), np.zeros((4, 40, 40), np.int64)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_this_machine(*values):
    """Returns helm's arguments for the image of the tests and free ports of the loopback."""
    ports = f"host=127.0.0.1,ports.grpc={free_port()},ports.metrics={free_port()}"
    return ("--set", ",".join([IMAGE, ports, *values]))


def playable(objects):
    """Returns the pod of a workload, and the ConfigMaps, as podman takes them."""
    spec = json.loads(json.dumps(pod_spec(objects)))
    spec["containers"] = [*spec.pop("initContainers", []), *spec["containers"]]
    spec["restartPolicy"] = "Never"  # one that fails is to say so
    for container in spec["containers"]:
        container.pop("ports", None)
        container.pop("restartPolicy", None)
    metadata = {"name": workload(objects)["metadata"]["name"], "labels": {"app": "lossd"}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return [*of_kind(objects, "ConfigMap"), pod]


@contextmanager
def playing(containers, objects, folder):
    """Yields the name of the server's container in a pod that podman runs, and takes it down."""
    manifest = folder / "pod.yaml"
    manifest.write_text("\n---\n".join(map(json.dumps, playable(objects))))  # JSON is YAML
    try:
        containers.run("podman", "play", "kube", "--network=host", manifest)
        yield f"{workload(objects)['metadata']['name']}-lossd"
    finally:
        containers.run("podman", "play", "kube", "--down", manifest, check=False)


def state_of(containers, container):
    """Returns whether a container runs, as which process, or how it ended."""
    return json.loads(containers.run("podman", "inspect", container).stdout)[0]["State"]


def log_of(containers, container):
    done = containers.run("podman", "logs", container)
    return done.stdout + done.stderr


def wait_until_serving(containers, container):
    """Waits for the line of the log that says so."""
    for _ in range(450):
        if '"serving"' in log_of(containers, container):
            return
        assert state_of(containers, container)["Running"], log_of(containers, container)
        time.sleep(0.2)
    pytest.fail(log_of(containers, container))


@pytest.fixture
def pod(containers, rendered, tmp_path):
    """A running pod of the Deployment: the rendered objects, and its server's container."""
    objects = rendered("default", *on_this_machine("drain.seconds=20"))
    with playing(containers, objects, tmp_path) as container:
        wait_until_serving(containers, container)
        yield objects, container


def address_of(objects):
    (port,) = [port["containerPort"] for port in server(objects)["ports"] if port["name"] == "grpc"]
    return f"127.0.0.1:{port}"


def test_the_pod_serves_within_its_limits(containers, pod):
    objects, container = pod
    with Client(address_of(objects)) as client:
        assert client.compute_loss(FocalLoss(), LOGITS, TARGETS, gradients=True).loss > 0
    metrics = next(port["containerPort"] for port in server(objects)["ports"] if port["name"] == "metrics")
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
        assert b'grpc_server_handled_total{grpc_code="OK",grpc_method="ComputeLoss"' in answer.read()
    state = json.loads(containers.run("podman", "inspect", container).stdout)[0]["HostConfig"]
    limits = server(objects)["resources"]["limits"]
    assert state["Memory"] == quantity(limits["memory"])
    assert state["NanoCpus"] == quantity(limits["cpu"]) * 1e9


def test_the_pod_may_do_as_little_as_the_chart_says(containers, pod):
    objects, container = pod
    process = state_of(containers, container)["Pid"]
    with open(f"/proc/{process}/status") as status:  # noqa: PTH123
        facts = dict(line.rstrip().split(":\t", 1) for line in status if ":\t" in line)
    user = pod_spec(objects)["securityContext"]["runAsUser"]
    assert facts["Uid"].split() == [str(user)] * 4
    assert facts["CapEff"] == facts["CapBnd"] == "0" * 16
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    refused = containers.run("podman", "exec", container, "touch", "/etc/lossd/x", "/srv/x", check=False)
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stderr
    containers.run("podman", "exec", container, "touch", "/tmp/x", "/var/cache/lossd/x")  # noqa: S108


def test_the_pod_finishes_what_runs_and_ends_with_0(containers, pod):
    objects, container = pod
    answered, refused, busy = [], [], threading.Event()

    def call_until_refused():
        with Client(address_of(objects), retries=None) as client:
            try:
                while True:
                    answered.append(client.compute_loss(FocalLoss(), LOGITS, TARGETS, gradients=True).loss)
                    busy.set()
            except LossdError as error:
                refused.append(error)

    callers = [threading.Thread(target=call_until_refused, daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    assert busy.wait(30)
    grace = pod_spec(objects)["terminationGracePeriodSeconds"]
    containers.run("podman", "stop", f"--time={grace}", container)
    for caller in callers:
        caller.join(30)
    assert len(set(map(float, answered))) == 1
    assert {error.code.name for error in refused} == {"UNAVAILABLE"}
    assert state_of(containers, container)["ExitCode"] == 0
    assert re.search(r'"drained": true.*"event": "stopped"', log_of(containers, container))


TRAINER = """import numpy, os, time
from lossd_client import Client, FocalLoss, LossdError
while True:
    try:
        client = Client(os.environ["LOSSD_TARGET"], timeout=30)
        print(client.server_info())
        break
    except LossdError:
        time.sleep(0.2)
logits = client.allocate((16, 80, 40, 40))
logits[...] = 0
result = client.compute_loss(FocalLoss(), logits, numpy.zeros((16, 40, 40), int), gradients=True)
shared = any("memfd" in line for line in open("/proc/self/maps"))
print("trained:", result.gradients["inputs"].shape, "shared:", shared)
"""


def test_a_trainer_shares_memory_with_the_sidecar_of_its_pod(containers, rendered, tmp_path):
    values = tmp_path / "values.yaml"
    trainer = {"image": "localhost/lossd:latest", "command": ["python3", "-c", TRAINER], "resources": {}}
    values.write_text(yaml.safe_dump({"user": 10001, "trainer": {**trainer, "env": [], "completions": 1}}))
    objects = rendered("sidecar", *on_this_machine(), "-f", values)
    with playing(containers, objects, tmp_path) as container:
        wait_until_serving(containers, container)
        trainer = container.removesuffix("lossd") + "trainer"
        done = containers.run("podman", "wait", trainer, timeout=90)
        assert done.stdout.strip() == "0", log_of(containers, trainer)
        assert "trained: (16, 80, 40, 40) shared: True" in log_of(containers, trainer)
        probe = server(objects)["readinessProbe"]["exec"]["command"]
        assert containers.run("podman", "exec", container, *probe).stdout.strip() == "SERVING"
        containers.run("podman", "stop", "--time=45", container)
        assert state_of(containers, container)["ExitCode"] == 0
