"""What an operator sees: health, reflection, metrics, listeners, and a graceful stop."""

import threading
from importlib.metadata import EntryPoint

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.errors import ConfigurationError
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    make_server,
    refusal,
    refusal_of,
)

HELD = ("tests.service.custom_modules:Held",)
SERVICE = "lossd.v1.LossService"


@pytest.mark.parametrize("name", ["", SERVICE])
def test_health_is_serving(server, name):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = refusal(stub.Check, health_pb2.HealthCheckRequest(service="foo"))
    assert found.code is grpc.StatusCode.NOT_FOUND


def test_health_watchers_hear_that_it_stops(held):
    server = make_server(load=HELD, drain_seconds=20)
    server.start()
    with connect(server) as stub, grpc.insecure_channel(server.addresses[0]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        call = held(stub)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        custom_modules.release.set()
        assert call.result(30).results
        watch.cancel()
        stopping.join(60)
        assert not stopping.is_alive()


def test_reflection_lists_the_service_and_its_types(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {SERVICE, "grpc.health.v1.Health"} <= services
        assert database.FindFileContainingSymbol(SERVICE).name == "lossd/v1/loss_service.proto"
        assert database.FindFileByName("lossd/v1/tensor.proto").package == "lossd.v1"


def test_a_taken_port_is_the_operators_error(server):
    other = make_server(listen=tuple(server.addresses))
    with pytest.raises(ConfigurationError, match="cannot listen") as caught:
        other.start()
    assert caught.value.field == "listen"
    other = make_server(metrics_port=server.metrics_port)
    with pytest.raises(ConfigurationError, match="cannot listen") as caught:
        other.start()
    assert caught.value.field == "metrics_port"


@pytest.mark.parametrize(
    "spec",
    [
        "nowhere:Class",
        "tests.service.custom_modules:Nowhere",
        "tests.service.custom_modules",
        "tests.service.custom_modules:SECRET",
        "threading:Thread",
        "torch.nn:Linear",
    ],
)
def test_a_module_that_does_not_load_is_the_operators_error(spec):
    with pytest.raises(ConfigurationError) as caught:
        make_server(load=(spec,))
    assert spec in caught.value.message


def test_unix_socket_and_several_addresses(tmp_path):
    address = f"unix:{tmp_path}/lossd.sock"
    with make_server(listen=(address, "127.0.0.1:0", "[::1]:0")) as server:
        assert server.addresses[0] == address
        for target in server.addresses:
            assert not target.endswith(":0")
            with grpc.insecure_channel(target) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1


def test_graceful_stop_finishes_what_runs_and_refuses_the_rest(held):
    server = make_server(load=HELD, drain_seconds=30)
    server.start()
    with connect(server) as stub:
        call = held(stub)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: refused_for_stopping(stub))
        assert not call.done()
        custom_modules.release.set()
        assert call.result(30).results
        stopping.join(30)
        assert not stopping.is_alive()
        assert refused_for_stopping(stub)


def refused_for_stopping(stub):
    try:
        stub.AssignTargets(good_assign_request(), timeout=30)
    except grpc.RpcError as error:
        return refusal_of(error).code is grpc.StatusCode.UNAVAILABLE
    return False


def test_a_call_that_will_not_end_does_not_hold_up_the_stop(held):
    server = make_server(load=HELD, drain_seconds=0.2)
    server.start()
    with connect(server) as stub:
        call = held(stub)
        server.stop()
        with pytest.raises(grpc.RpcError):
            call.result(30)


@pytest.mark.timeout(60)
def test_what_is_open_but_asks_nothing_does_not_hold_up_the_stop():
    server = make_server(drain_seconds=600)
    server.start()
    with connect(server) as stub, grpc.insecure_channel(server.addresses[0]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        release = threading.Event()
        stream = stub.ComputeLossStream(_when(release))
        server.stop()
        release.set()
        with pytest.raises(grpc.RpcError):
            next(stream)


def _when(released):
    """No request at all, until released."""
    released.wait(60)
    yield from ()


def test_stop_twice_and_a_server_never_started():
    server = make_server()
    server.stop()
    server = make_server()
    server.start()
    server.stop()
    server.stop()


def test_a_deadline_that_passes_in_the_queue(fresh, held):
    with connect(fresh) as stub:
        call = held(stub)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ComputeLoss(good_loss_request(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: value(fresh, "lossd_refusals_total", reason="DEADLINE_EXCEEDED") == 1)
        custom_modules.release.set()
        assert call.result(30).results
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results


def test_custom_losses_are_found_by_entry_point(monkeypatch):
    point = EntryPoint("plain_square", "tests.service.custom_modules:Squared", "lossd.losses")
    monkeypatch.setattr("lossd_server.engine.custom.entry_points", lambda group: [point])
    with make_server(load=("tests.service.custom_modules:Squared",)) as server, connect(server) as stub:
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        assert {loss.name for loss in info.custom_losses} == {"plain_square", "Squared"}
