"""Streams whose callers wait for each answer: answered in turn, counted as calls, with room of their own."""

import threading
import time

import grpc
import pytest

from lossd.headers import ONE_AT_A_TIME
from lossd.v1 import loss_service_pb2 as pb
from lossd_server.rpc.stages import STAGES
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    make_server,
    refusal_of,
)
from tests.service.test_streams import OpenStream, held_envelope, loss_envelope, readers

HELD = ("tests.service.custom_modules:Held",)
UNARY = {"grpc_type": "unary", "grpc_method": "ComputeLoss"}


class OpenLane(OpenStream):
    """A stream of which the test says that it asks one at a time."""

    def __init__(self, method):
        super().__init__(
            lambda requests, **settings: method(requests, metadata=[(ONE_AT_A_TIME, "1")], **settings)
        )


def is_free(server):
    return lambda: server._handlers._lanes.used == 0


def test_answers_are_those_of_calls(small_server, small_stub):
    loss, targets = good_loss_request(), good_assign_request()
    lane = OpenLane(small_stub.ComputeLossStream)
    for mark in (3, -1, 0):
        answer = lane.ask(loss_envelope(mark, loss))
        assert (answer.id, list(answer.response.results)) == (
            mark,
            list(small_stub.ComputeLoss(loss).results),
        )
    assert lane.half_close() == []
    lane = OpenLane(small_stub.AssignTargetsStream)
    answer = lane.ask(pb.AssignTargetsStreamRequest(id=7, request=targets))
    assert (answer.id, list(answer.response.results)) == (7, list(small_stub.AssignTargets(targets).results))
    lane.half_close()
    eventually(is_free(small_server))


def test_no_thread_is_made_for_it(small_stub):
    before = readers()
    lane = OpenLane(small_stub.ComputeLossStream)
    lane.ask(loss_envelope(1, good_loss_request()))
    assert {*readers()} <= {*before}
    lane.half_close()


def test_one_who_does_not_wait_is_answered_in_turn(small_stub):
    lane = OpenLane(small_stub.ComputeLossStream)
    lane.send(*(loss_envelope(mark, good_loss_request()) for mark in range(1, 30)))
    assert [answer.id for answer in lane.half_close()] == [*range(1, 30)]


def test_a_refusal_is_an_answer_and_the_next_request_is_welcome(small_stub):
    lane = OpenLane(small_stub.ComputeLossStream)
    assert lane.ask(loss_envelope(1, pb.ComputeLossRequest())).error.field == "loss"
    assert lane.ask(pb.ComputeLossStreamRequest(id=2)).error.field == "request"
    assert lane.ask(loss_envelope(3, good_loss_request())).response.results
    lane.half_close()


def test_bytes_that_are_no_message_end_it(small_server, small_stub):
    with grpc.insecure_channel(small_server.addresses[0]) as channel:
        method = channel.stream_stream("/lossd.v1.LossService/ComputeLossStream")
        with pytest.raises(grpc.RpcError) as caught:
            next(method(iter([b"\xff"]), metadata=[(ONE_AT_A_TIME, "1")], timeout=30))
    assert refusal_of(caught.value).reason == "MALFORMED_REQUEST"
    eventually(is_free(small_server))
    assert small_stub.ComputeLoss(good_loss_request()).results


def test_requests_are_counted_as_calls(small_server, small_stub):
    lane = OpenLane(small_stub.ComputeLossStream)
    for mark in range(5):
        lane.ask(loss_envelope(mark, good_loss_request()))
    lane.ask(loss_envelope(5, pb.ComputeLossRequest()))
    lane.half_close()

    def count(name, **labels):
        return value(small_server, name, **UNARY, **labels)

    eventually(lambda: count("grpc_server_handled_total") == 6)
    assert count("grpc_server_handled_total", grpc_code="OK") == 5
    assert count("grpc_server_handled_total", grpc_code="INVALID_ARGUMENT") == 1
    for name in ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"):
        assert count(f"grpc_server_{name}") == 6
    assert count("grpc_server_handling_seconds_sum") > 0
    assert value(small_server, "lossd_in_flight", method="ComputeLoss") == 0
    stages = {
        s: value(small_server, "lossd_stage_seconds_count", method="ComputeLoss", stage=s) for s in STAGES
    }
    assert (stages["decode"], stages["compute"]) == (6, 5)


def test_requests_of_other_streams_are_not(small_server, small_stub):
    stream = OpenStream(small_stub.ComputeLossStream)
    stream.ask(loss_envelope(1, good_loss_request()))
    stream.half_close()
    eventually(lambda: value(small_server, "grpc_server_handled_total", grpc_method="ComputeLossStream") == 1)
    assert value(small_server, "grpc_server_handled_total", **UNARY) == 0


def test_lanes_are_so_many_and_streams_have_their_own_room(small_server, small_stub):
    lanes = [OpenLane(small_stub.ComputeLossStream) for _ in range(2)]  # of 3: one is left for others
    for lane in lanes:
        lane.ask(loss_envelope(1, good_loss_request()))
    with pytest.raises(grpc.RpcError) as caught:
        OpenLane(small_stub.ComputeLossStream).ask(loss_envelope(1, good_loss_request()))
    assert refusal_of(caught.value).reason == "TOO_MANY_STREAMS"
    stream = OpenStream(small_stub.ComputeLossStream)
    assert stream.ask(loss_envelope(1, good_loss_request())).response.results
    for each in (stream, *lanes):
        each.half_close()
    eventually(is_free(small_server))


def test_one_whose_caller_goes_away_is_free_again(small_server, small_stub):
    lane = OpenLane(small_stub.ComputeLossStream)
    lane.ask(loss_envelope(1, good_loss_request()))
    lane.answers.cancel()
    eventually(is_free(small_server))


def test_a_stopping_server_waits_for_nobody_who_asks_nothing():
    server = make_server(drain_seconds=600)
    server.start()
    with connect(server) as stub:
        lane = OpenLane(stub.ComputeLossStream)
        lane.ask(loss_envelope(1, good_loss_request()))
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 60
        with pytest.raises(grpc.RpcError) as caught:
            next(lane.answers)
    assert caught.value.code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}


def test_a_stopping_server_answers_what_it_works_on(device_held):
    server = make_server(load=HELD, drain_seconds=600)
    server.start()
    with connect(server) as stub:
        lane = OpenLane(stub.ComputeLossStream)
        lane.send(held_envelope(1))
        assert device_held.wait(30)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: server._handlers._is_draining)
        custom_modules.release.set()
        assert next(lane.answers).WhichOneof("outcome") == "response"
        with pytest.raises(grpc.RpcError) as caught:
            next(lane.answers)
        stopping.join(60)
        assert not stopping.is_alive()
    assert refusal_of(caught.value).reason == "DRAINING"
