"""Too many callers, greedy ones, and such as never send what they announced; the others are served."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossd.headers import CANCELLED_FOR, REQUEST_BYTES
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.rpc.standard import MAX_REFLECTIONS, MAX_WATCHERS
from lossd_server.rpc.status import ELSEWHERE_SECONDS
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.support import (
    connect,
    focal_arrays,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
    refusal_of,
)

HELD = ("tests.service.custom_modules:Held",)
METHODS = ("ComputeLoss", "AssignTargets")
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health"
MEBIBYTE = 1 << 20
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "lossd.v1.LossService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.001s",
                "maxBackoff": "0.001s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""What any gRPC client can be told: without the server's word, five tries within milliseconds."""


class Withheld:
    """Calls whose bodies do not come until the block ends."""

    def __init__(self, channel):
        self._channel = channel
        self._released = threading.Event()
        self._open = []  # gRPC ends calls that nobody refers to

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.release()

    def call(self, path, **metadata):
        """A call of a unary method."""
        named = list(metadata.items())
        self._open.append(self._channel.stream_unary(path).future(self._bodies(), metadata=named, timeout=60))
        return self._open[-1]

    def stream(self, path, *bodies):
        """A call of a method with a stream of answers."""
        self._open.append(self._channel.stream_stream(path)(self._bodies(bodies), timeout=60))
        return self._open[-1]

    def release(self):
        """Lets the bodies come."""
        self._released.set()

    def _bodies(self, bodies=()):
        self._released.wait(60)
        yield from bodies


def path_of(method):
    return f"/lossd.v1.LossService/{method}"


@contextmanager
def withheld(server):
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.addresses[0], options=options) as channel, Withheld(channel) as calls:
        yield calls


@contextmanager
def another(server):
    """A stub over a connection of its own that does not try again."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(server.addresses[0], options=options) as channel:
        yield LossServiceStub(channel)


def is_let_in(server, count):
    return lambda: server._admission.requests == count


def test_a_call_beyond_a_connections_share_is_refused_and_another_connections_is_not(held):
    with (
        make_server(load=HELD, max_in_flight=2) as server,
        another(server) as greedy,
        another(server) as other,
    ):
        call = held(greedy)
        with pytest.raises(grpc.RpcError) as caught:
            greedy.AssignTargets(good_assign_request(), timeout=30)
        found = refusal_of(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert (found.metadata["value"], found.metadata["limit"]) == ("1", "2")
        assert found.retry_seconds > 0
        pushback = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
        assert float(pushback) / 1000 == found.retry_seconds
        assert other.AssignTargets(good_assign_request(), timeout=30).results
        assert value(server, "lossd_refusals_total", method="AssignTargets", reason="OVERLOADED") == 1
        custom_modules.release.set()
        assert call.result(30).results
        eventually(is_let_in(server, 0))
        assert greedy.AssignTargets(good_assign_request(), timeout=30).results


@pytest.mark.parametrize("method", METHODS)
def test_who_is_turned_away_is_so_before_its_body_comes(method):
    with make_server(max_in_flight=1) as server, withheld(server) as calls:
        calls.call(path_of("ComputeLoss"))
        eventually(is_let_in(server, 1))
        assert refusal_of(calls.call(path_of(method)).exception()).reason == "OVERLOADED"


def test_grpcs_own_retries_wait_as_long_as_they_are_told():
    with make_server(max_in_flight=1) as server, withheld(server) as calls:
        first = calls.call(path_of("ComputeLoss"))
        eventually(is_let_in(server, 1))
        options = [("grpc.service_config", json.dumps(RETRIES)), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.addresses[0], options=options) as channel:
            answer = LossServiceStub(channel).AssignTargets.future(good_assign_request(), timeout=60)
            eventually(lambda: value(server, "lossd_refusals_total", reason="OVERLOADED") >= 1)
            first.cancel()
            assert answer.result().results


def test_bytes_that_are_declared_are_refused_before_they_come():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE}
    with make_server(**limits) as server, withheld(server) as calls, another(server) as other:
        calls.call(path_of("ComputeLoss"), **{REQUEST_BYTES: str(MEBIBYTE)})
        eventually(lambda: value(server, "lossd_in_flight_bytes") == MEBIBYTE)
        found = refusal_of(calls.call(path_of("ComputeLoss"), **{REQUEST_BYTES: "1"}).exception())
        assert (found.reason, found.metadata["limit"]) == ("OVERLOADED", str(MEBIBYTE))
        found = refusal(other.AssignTargets, good_assign_request())  # which declares nothing
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")


@pytest.mark.parametrize("declared", ["", "-1", "1e3", "0", "9" * 12, "9" * 13, "9" * 5000])
def test_a_declaration_that_cannot_be_so_is_none_of_the_servers_business(server, declared):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        stub = LossServiceStub(channel)
        metadata = [(REQUEST_BYTES, declared)]
        assert stub.ComputeLoss(good_loss_request(), metadata=metadata, timeout=30).results
    eventually(lambda: server._admission.bytes == 0)


def test_a_request_on_a_stream_without_room_for_its_bytes_is_answered_so():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE}
    request = pb.ComputeLossStreamRequest(id=3, request=good_loss_request())
    with make_server(**limits) as server, withheld(server) as calls, connect(server) as stub:
        first = calls.call(path_of("ComputeLoss"), **{REQUEST_BYTES: str(MEBIBYTE)})
        eventually(lambda: server._admission.bytes == MEBIBYTE)
        (answer,) = stub.ComputeLossStream(iter([request]), timeout=30)
        assert (answer.id, answer.error.reason) == (3, pb.ERROR_REASON_OVERLOADED)
        assert answer.error.retry_delay_ms > 0
        first.cancel()
        eventually(lambda: server._admission.bytes == 0)
        (answer,) = stub.ComputeLossStream(iter([request]), timeout=30)
        assert answer.response.results


def test_a_body_that_does_not_come_ends_its_call():
    with make_server(read_seconds=0.2) as server, withheld(server) as calls, connect(server) as stub:
        call = calls.call(path_of("ComputeLoss"))
        assert call.exception().code() is grpc.StatusCode.CANCELLED
        assert dict(call.initial_metadata())[CANCELLED_FOR] == "BODY_TOO_SLOW"
        eventually(lambda: value(server, "lossd_refusals_total", reason="BODY_TOO_SLOW") == 1)
        eventually(is_let_in(server, 0))
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results


def test_a_call_without_a_message_is_malformed(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        found = refusal(channel.stream_unary(path_of("ComputeLoss")), iter(()))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


def test_bodies_that_do_not_come_make_room_for_those_that_do():
    with make_server(max_in_flight=4, read_seconds=600) as server, ExitStack() as stack:
        for _ in range(5):
            calls = stack.enter_context(withheld(server))
            for _ in range(3):
                calls.call(path_of("AssignTargets"))
        eventually(is_let_in(server, 4))
        good = stack.enter_context(another(server))
        eventually(lambda: is_answered(good))
        eventually(lambda: value(server, "lossd_refusals_total", reason="BODY_TOO_SLOW") >= 1)


def is_answered(stub):
    try:
        return bool(stub.AssignTargets(good_assign_request(), timeout=30).results)
    except grpc.RpcError:
        return False


def test_one_who_asks_a_thousand_times_at_once_does_not_keep_another_out():
    with make_server(max_in_flight=32) as server, another(server) as greedy, another(server) as modest:
        futures = [greedy.AssignTargets.future(good_assign_request(), timeout=60) for _ in range(1000)]
        for _ in range(50):
            assert modest.AssignTargets(good_assign_request(), timeout=60).results
        assert all(future.result().results for future in futures)


def test_health_is_told_beside_bodies_that_do_not_come():
    with make_server(read_seconds=600) as server, withheld(server) as calls, connect(server) as stub:
        for _ in range(100):
            calls.call(f"{HEALTH}/Check")
            calls.stream(f"{HEALTH}/Watch")
            calls.stream(REFLECTION)
        assert health_of(server) == health_pb2.HealthCheckResponse.SERVING
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results


def health_of(server):
    with grpc.insecure_channel(
        server.addresses[0], options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


def test_watchers_of_health_are_so_many_and_no_more(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_WATCHERS // 2)]
        assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.SERVING}
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest()))
        assert refusal_of(caught.value).reason == "TOO_MANY_STREAMS"
        assert health_of(server) == health_pb2.HealthCheckResponse.SERVING
        for watch in watches:
            watch.cancel()
    eventually(lambda: server._standard._watchers.used == 0)


def test_watchers_whose_bodies_are_all_late_are_all_served():
    with make_server(read_seconds=600) as server, withheld(server) as calls:
        body = health_pb2.HealthCheckRequest().SerializeToString()
        watches = [calls.stream(f"{HEALTH}/Watch", body) for _ in range(MAX_WATCHERS // 2)]
        eventually(lambda: len(server._standard._reader._waits) == len(watches))
        calls.release()
        for watch in watches:
            found = health_pb2.HealthCheckResponse.FromString(next(watch))
            assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_streams_are_so_many_and_no_more():
    with make_server(read_seconds=600) as server, withheld(server) as calls:
        streams = [calls.stream(REFLECTION) for _ in range(MAX_REFLECTIONS // 2)]
        eventually(lambda: server._standard._reflections.used == len(streams))
        with pytest.raises(grpc.RpcError) as caught:
            next(calls.stream(REFLECTION))
        assert refusal_of(caught.value).reason == "TOO_MANY_STREAMS"


def test_reflection_streams_that_ask_nothing_end():
    with make_server(read_seconds=0.2) as server, withheld(server) as calls:
        with pytest.raises(grpc.RpcError) as caught:
            next(calls.stream(REFLECTION))
        assert caught.value.code() is grpc.StatusCode.CANCELLED


def test_an_overload_is_refused_and_over_when_it_is_over():
    with make_server(max_in_flight=4) as server, ThreadPoolExecutor(16) as callers:

        def ask(_index):
            with another(server) as stub:
                try:
                    return bool(stub.ComputeLoss(request, timeout=60).results)
                except grpc.RpcError as error:
                    return refusal_of(error).reason

        request = loss_request(losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(0), 20_000)])
        outcomes = set(callers.map(ask, range(200)))
        assert outcomes <= {True, "OVERLOADED"}
        assert True in outcomes
        eventually(is_let_in(server, 0))
        assert ask(0) is True


def test_a_body_that_comes_once_the_server_stops_is_refused_so(held):
    server = make_server(load=HELD, drain_seconds=30)
    server.start()
    with another(server) as stub, grpc.insecure_channel(server.addresses[0]) as channel:
        running, released = held(stub), threading.Event()
        late = channel.stream_unary(path_of("ComputeLoss")).future(when(released), timeout=60)
        eventually(is_let_in(server, 2))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: server._admission._draining)
        released.set()
        found = refusal_of(late.exception())
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert found.retry_seconds == ELSEWHERE_SECONDS
        custom_modules.release.set()
        assert running.result(30).results
        stopping.join(60)
        assert not stopping.is_alive()


def when(released):
    released.wait(60)
    yield good_loss_request().SerializeToString()
