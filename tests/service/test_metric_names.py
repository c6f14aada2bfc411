"""The metrics that exist and those of the README's table are the same, and begin at zero."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from lossd_server.engine import devices, resources
from lossd_server.errors import Reason
from lossd_server.rpc.collectors import register_device
from lossd_server.rpc.metrics import Metrics, State
from tests.service.metrics import eventually, samples, value
from tests.service.support import connect, good_loss_request, make_server

README = Path(__file__).parents[2] / "README.md"
SUFFIXES = {"counter": "_total", "info": "_info"}
MEMORY = {"allocated": 1, "reserved": 2, "free": 3, "total": 4}


def table():
    """The README's metrics by name, each with its labels."""
    _, _, text = README.read_text().partition("| metric | labels |")
    rows = [line.split("|") for line in text.partition("\n\n")[0].splitlines()]
    return {
        name: set(re.findall(r"`(\w+)`", labels))
        for _, names, labels, *_ in rows[2:]
        for name in re.findall(r"`(\w+)`", names)
    }


@pytest.fixture
def registry(monkeypatch, tmp_path) -> CollectorRegistry:
    """Every metric there can be: also those of a GPU, and of a limit of memory."""
    limit = tmp_path / "memory.max"
    limit.write_text("4294967296\n")
    monkeypatch.setattr(resources, "_MEMORY_V2", limit)
    metrics = Metrics()
    metrics.build.info({"version": "1", "device": "cpu"})
    register_device(metrics.registry, lambda: MEMORY)
    return metrics.registry


def test_the_table_of_the_readme_lists_every_metric_and_no_other(registry):
    found = {family.name + SUFFIXES.get(family.type, ""): family for family in registry.collect()}
    wanted = table()
    assert found.keys() == wanted.keys()
    for name, family in found.items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == wanted[name], name


def test_every_metric_says_what_it_is(registry):
    assert all(family.documentation for family in registry.collect())


def test_what_has_not_happened_yet_is_zero_and_not_absent():
    registry = Metrics().registry
    for reason in Reason:
        labels = {"method": "AssignTargets", "reason": reason}
        assert registry.get_sample_value("lossd_refusals_total", labels) == 0
    labels = {"grpc_service": "lossd.v1.LossService", "grpc_method": "ComputeLossStream"}
    labels |= {"grpc_type": "bidi_stream", "grpc_code": "INTERNAL"}
    assert registry.get_sample_value("grpc_server_handled_total", labels) == 0


def test_calls_make_no_series_that_was_not_there_before(fresh):
    before = {(name, *sorted(labels.items())) for name, labels, _ in samples(fresh)}
    with connect(fresh) as stub:
        stub.ComputeLoss(good_loss_request())
    eventually(lambda: value(fresh, "grpc_server_handled_total", grpc_code="OK") == 1)
    assert {(name, *sorted(labels.items())) for name, labels, _ in samples(fresh)} == before


def test_states_follow_one_another():
    server = make_server()
    registry = server._metrics.registry

    def state():
        values = {s: registry.get_sample_value("lossd_state", {"state": s}) for s in State}
        assert sum(values.values()) == 1
        return max(values, key=values.get)

    assert state() == State.STARTING
    server.start()
    assert state() == State.SERVING
    server.stop()
    assert state() == State.DRAINING


def test_memory_of_a_gpu_is_there_only_where_there_is_a_gpu(fresh):
    assert not any(name == "lossd_gpu_memory_bytes" for name, _, _ in samples(fresh))


def test_a_gpu_that_does_not_answer_does_not_hold_up_the_rest(monkeypatch):
    def fail(_device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("torch.cuda.mem_get_info", fail)
    assert devices.device_memory(devices.torch.device("cuda", 0)) == {}


def test_a_gpu_tells_what_is_allocated_reserved_free_and_total(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (3, 4))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 1)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 2)
    assert devices.device_memory(devices.torch.device("cuda", 0)) == MEMORY


@pytest.mark.parametrize(
    ("text", "limit"), [("4294967296\n", 2**32), ("max\n", None), ("9223372036854771712\n", None), ("", None)]
)
def test_the_limit_of_memory_is_the_control_groups(monkeypatch, tmp_path, text, limit):
    path = tmp_path / "memory.max"
    path.write_text(text)
    monkeypatch.setattr(resources, "_MEMORY_V2", path)
    assert resources.granted_memory() == limit


def test_kernels_that_are_not_there_are_told(monkeypatch, fresh):
    monkeypatch.setattr(devices, "loaded_library", lambda: None)
    assert value(fresh, "lossd_compiled_kernels") == 0
