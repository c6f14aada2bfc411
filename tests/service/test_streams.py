"""The bidirectional streams: answers by id, refusals that end nothing, and a bounded number."""

import collections
import queue
import threading
import time

import grpc
import numpy as np
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.rpc.pipeline import WIDTH
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.support import (
    CASES,
    connect,
    focal_arrays,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal_of,
)


def loss_envelope(mark, request):
    return pb.ComputeLossStreamRequest(id=mark, request=request)


def held_envelope(mark):
    """A request that holds the device until `custom_modules.release` is set."""
    pred = {"pred": np.ones(2, np.float32)}
    return loss_envelope(mark, loss_request(losses_pb2.CustomLoss(name="Held"), [pred]))


class OpenStream:
    """A stream that the test feeds one request at a time, and keeps open."""

    def __init__(self, method):
        self._requests = queue.SimpleQueue()
        self.answers = method(iter(self._requests.get, None), timeout=60)

    def ask(self, request):
        self.send(request)
        return next(self.answers)

    def send(self, *requests):
        for request in requests:
            self._requests.put(request)

    def half_close(self):
        self.send(None)
        return list(self.answers)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "lossd-reader"]


def test_losses_are_answered_by_id(stub):
    rng = np.random.default_rng(5)
    requests = {
        mark: loss_request(case.config, [case.arrays(rng, 3)], gradients=case.module.differentiable)
        for mark, case in zip((9, -4, 2**63 - 1, 0, 7, 6, 5, 4, 3), CASES.values(), strict=True)
    }
    answers = list(stub.ComputeLossStream(iter(map(loss_envelope, requests, requests.values()))))
    assert sorted(answer.id for answer in answers) == sorted(requests)
    for answer in answers:
        unary = stub.ComputeLoss(requests[answer.id])
        assert list(answer.response.results) == list(unary.results)
        assert answer.response.timings.compute_us > 0


def test_targets_are_answered_by_id(stub):
    good = good_assign_request()
    sparse = pb.AssignTargetsRequest(items=good.items, format=pb.TARGET_FORMAT_SPARSE)
    requests = {1: good, 2: sparse, 3: good}
    envelopes = [pb.AssignTargetsStreamRequest(id=mark, request=r) for mark, r in requests.items()]
    answers = list(stub.AssignTargetsStream(iter(envelopes)))
    assert sorted(answer.id for answer in answers) == [1, 2, 3]
    for answer in answers:
        unary = stub.AssignTargets(requests[answer.id])
        assert list(answer.response.results) == list(unary.results)


def test_a_stream_without_requests_ends(stub):
    assert list(stub.ComputeLossStream(iter([]))) == []
    assert list(stub.AssignTargetsStream(iter([]))) == []


def test_an_answer_comes_before_the_next_request(stub):
    stream = OpenStream(stub.ComputeLossStream)
    assert [stream.ask(loss_envelope(mark, good_loss_request())).id for mark in (1, 2, 3)] == [1, 2, 3]
    assert stream.half_close() == []


def test_a_refused_request_does_not_end_its_stream(stub):
    bad = good_loss_request()
    bad.items[0].focal.inputs.shape[:] = [9, 9]
    unknown = loss_request(losses_pb2.CustomLoss(name="Nowhere"), [])
    unknown.items.add()
    requests = [good_loss_request(), bad, unknown, good_loss_request()]
    answers = {
        a.id: a for a in stub.ComputeLossStream(iter([loss_envelope(i, r) for i, r in enumerate(requests)]))
    }
    assert [answers[i].WhichOneof("outcome") for i in range(4)] == ["response", "error", "error", "response"]
    assert answers[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answers[1].error.reason == pb.ERROR_REASON_INVALID_TENSOR
    assert answers[1].error.field == "items[0].focal.inputs"
    assert "items[0].focal.inputs" in answers[1].error.message
    assert answers[1].error.metadata["shape"] == "[9, 9]"
    assert answers[2].error.code == grpc.StatusCode.NOT_FOUND.value[0]


def test_an_envelope_without_request_is_refused_and_the_stream_goes_on(stub):
    envelopes = [pb.AssignTargetsStreamRequest(id=1), pb.AssignTargetsStreamRequest(id=2)]
    envelopes[1].request.CopyFrom(good_assign_request())
    answers = {answer.id: answer for answer in stub.AssignTargetsStream(iter(envelopes))}
    refused, answered = answers[1], answers[2]
    assert (refused.id, refused.error.reason, refused.error.field) == (
        1,
        pb.ERROR_REASON_MISSING_FIELD,
        "request",
    )
    assert (answered.id, answered.WhichOneof("outcome")) == (2, "response")


@pytest.mark.parametrize("method", ["ComputeLossStream", "AssignTargetsStream"])
def test_a_malformed_envelope_ends_the_stream_with_its_reason(server, stub, method):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        answers = channel.stream_stream(f"/lossd.v1.LossService/{method}")(iter([b"\xff\xff junk"]))
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
    found = refusal_of(caught.value)
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert found.metadata["type"] == f"lossd.v1.{method}Request"
    assert len(stub.ComputeLoss(good_loss_request()).results) == 1


def test_streams_beyond_the_limit_are_turned_away_and_calls_are_not(small_server, small_stub):
    first = OpenStream(small_stub.ComputeLossStream)
    second = OpenStream(small_stub.ComputeLossStream)
    envelope = loss_envelope(1, good_loss_request())
    first.ask(envelope)
    second.ask(envelope)
    with pytest.raises(grpc.RpcError) as caught:
        OpenStream(small_stub.AssignTargetsStream).half_close()
    found = refusal_of(caught.value)
    assert (found.code, found.reason, found.domain) == (
        grpc.StatusCode.UNAVAILABLE,
        "TOO_MANY_STREAMS",
        "lossd",
    )
    assert found.retry_seconds > 0
    assert (found.metadata["value"], found.metadata["limit"]) == ("2", "3")
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(small_server.addresses[0], options=own) as another:
        assert OpenStream(LossServiceStub(another).ComputeLossStream).ask(envelope).id == 1
    for _ in range(8):
        assert small_stub.ComputeLoss(good_loss_request(), timeout=30).results
        assert small_stub.AssignTargets(good_assign_request(), timeout=30).results
    assert second.ask(envelope).id == 1
    first.half_close()
    third = OpenStream(small_stub.ComputeLossStream)
    assert third.ask(envelope).WhichOneof("outcome") == "response"
    second.half_close()
    third.half_close()


def wait_for_a_place(stub):
    """Opens a stream as soon as there is room; fails when there is none within seconds."""
    ends = time.monotonic() + 20
    while True:
        stream = OpenStream(stub.ComputeLossStream)
        try:
            return stream.ask(loss_envelope(1, good_loss_request())), stream.half_close()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > ends:
                raise
            time.sleep(0.02)


def test_cancelled_streams_free_their_places(small_stub):
    for _ in range(4):
        streams = [OpenStream(small_stub.ComputeLossStream) for _ in range(2)]
        for stream in streams:
            stream.ask(loss_envelope(1, good_loss_request()))
        for stream in streams:
            stream.answers.cancel()
        wait_for_a_place(small_stub)


def test_a_caller_that_never_reads_frees_its_place_when_it_goes(small_stub):
    request = loss_request(
        losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(0), 50_000)], gradients=["inputs"]
    )
    for _ in range(3):
        streams = [
            small_stub.ComputeLossStream(iter([loss_envelope(i, request) for i in range(20)]))
            for _ in range(2)
        ]
        for answers in streams:
            next(answers)
        for answers in streams:
            answers.cancel()
        wait_for_a_place(small_stub)


def test_a_request_is_answered_while_an_earlier_one_is_computed(fresh, device_held):
    with connect(fresh) as stub:
        stream = OpenStream(stub.ComputeLossStream)
        stream.send(held_envelope(1))
        assert device_held.wait(30)
        assert stream.ask(pb.ComputeLossStreamRequest(id=2)).error.reason == pb.ERROR_REASON_MISSING_FIELD
        custom_modules.release.set()
        (last,) = stream.half_close()
        assert (last.id, last.WhichOneof("outcome")) == (1, "response")


def test_no_more_requests_are_read_than_there_are_places(fresh, device_held):
    with connect(fresh) as stub:
        stream = OpenStream(stub.ComputeLossStream)
        stream.send(*(held_envelope(mark) for mark in range(3 * WIDTH)))
        received = {"grpc_method": "ComputeLossStream"}
        eventually(lambda: value(fresh, "grpc_server_msg_received_total", **received) == WIDTH)
        assert value(fresh, "lossd_in_flight", method="ComputeLoss") == WIDTH
        custom_modules.release.set()
        assert sorted(answer.id for answer in stream.half_close()) == list(range(3 * WIDTH))
        assert fresh._admission.wait_until_answered(30)


def test_what_was_read_before_a_malformed_envelope_is_answered(server):
    data = loss_envelope(7, good_loss_request()).SerializeToString()
    with grpc.insecure_channel(server.addresses[0]) as channel:
        method = channel.stream_stream("/lossd.v1.LossService/ComputeLossStream")
        answers = method(iter([data, data, b"\xff\xff junk"]))
        found = [pb.ComputeLossStreamResponse.FromString(next(answers)) for _ in range(2)]
        assert [answer.id for answer in found] == [7, 7]
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert refusal_of(caught.value).reason == "MALFORMED_REQUEST"


def test_a_stopping_server_answers_what_it_read_and_ends_the_stream(device_held):
    server = make_server(load=("tests.service.custom_modules:Held",), drain_seconds=60)
    server.start()
    with connect(server) as stub:
        stream = OpenStream(stub.ComputeLossStream)
        stream.send(held_envelope(1))
        assert device_held.wait(30)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: server._engine._is_draining)
        stream.send(*(loss_envelope(mark, good_loss_request()) for mark in range(2, 40)))
        custom_modules.release.set()
        answers = []
        with pytest.raises(grpc.RpcError) as caught:
            collections.deque(map(answers.append, stream.answers), maxlen=0)
        stopping.join(60)
        assert not stopping.is_alive()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert refusal_of(caught.value).reason == "DRAINING"
    outcomes = {answer.id: answer for answer in answers}
    assert outcomes.pop(1).WhichOneof("outcome") == "response"
    assert all(answer.error.reason == pb.ERROR_REASON_DRAINING for answer in outcomes.values())
    eventually(lambda: not readers())


def test_a_caller_who_never_stops_sending_does_not_hold_up_the_stop():
    server = make_server(drain_seconds=600)
    server.start()
    with connect(server) as stub:
        answers = stub.ComputeLossStream(loss_envelope(1, good_loss_request()) for _ in iter(int, 1))
        assert next(answers).id == 1
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            collections.deque(answers, maxlen=0)
        stopping.join(60)
        assert not stopping.is_alive()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    eventually(lambda: not readers())


def test_a_cancelled_stream_leaves_nothing_behind(fresh, device_held):
    with connect(fresh) as stub:
        for _ in range(3):
            stream = OpenStream(stub.ComputeLossStream)
            stream.send(*(held_envelope(mark) for mark in range(2 * WIDTH)))
            eventually(lambda: value(fresh, "lossd_in_flight", method="ComputeLoss") >= WIDTH)
            stream.answers.cancel()
        custom_modules.release.set()
        assert fresh._admission.wait_until_answered(30)
        eventually(lambda: not readers())
        assert stub.ComputeLoss(good_loss_request(), timeout=30).results
