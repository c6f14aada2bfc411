"""Requests that are known again: what they hold is what protobuf says, and all is checked every time."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import _MARKER, Parcel
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.rpc import forms as module
from lossd_server.rpc.forms import Forms
from lossd_server.rpc.methods import Method, StreamMethod
from tests.domain.oracle_wire import assert_is
from tests.domain.wire_bytes import message_bytes, varint
from tests.service.support import (
    CASES,
    assign_request,
    evaluate_locally,
    focal_grid_arrays,
    loss_request,
    refusal,
    same_bits,
    scene,
)

KINDS = (pb.ComputeLossRequest, pb.AssignTargetsRequest)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.DESCRIPTOR.name)
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def focal(rng, rows=3):
    return loss_request(CASES["focal-grid"].config, [focal_grid_arrays(rng, rows)], gradients=["inputs"])


def assert_reads_as_protobuf(forms, kind, data):
    try:
        expected = kind.FromString(data)
    except DecodeError:
        with pytest.raises(InvalidInputError) as caught:
            forms.read(data)
        assert caught.value.reason is Reason.MALFORMED_REQUEST
        return
    request = forms.read(data)
    assert_is(Parcel(request.message, request.payloads), expected)


@every_kind
def test_any_bytes_are_what_protobuf_says_however_often_they_come(kind):
    @many
    @given(message_bytes(kind.DESCRIPTOR))
    def agrees(data):
        forms = Forms(kind)
        for _ in range(3):
            assert_reads_as_protobuf(forms, kind, data)

    agrees()


@every_kind
def test_so_are_bytes_that_are_like_those_before(kind):
    places = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=3)

    @many
    @given(message_bytes(kind.DESCRIPTOR), st.lists(places, min_size=1, max_size=4))
    def agrees(data, several):
        forms = Forms(kind)
        for _ in range(2):
            assert_reads_as_protobuf(forms, kind, data)
        for changes in several:
            mutated = bytearray(data)
            for place, byte in changes[: len(data)]:
                mutated[place % len(mutated)] = byte
            assert_reads_as_protobuf(forms, kind, bytes(mutated))
            assert_reads_as_protobuf(forms, kind, data)

    agrees()


def test_a_form_is_learned_when_it_comes_again_and_its_plan_made_once(rng):
    forms, plans = Forms(pb.ComputeLossRequest), []

    def plan(message):
        plans.append(message)
        return message

    requests = [forms.read(focal(rng).SerializeToString()) for _ in range(4)]
    assert [request.form is None for request in requests] == [True, False, False, False]
    assert len({id(request.planned(plan)) for request in requests[1:]}) == 1
    assert len(plans) == 1
    assert requests[0].planned(plan) is requests[0].message


def test_every_tensor_has_the_bytes_of_its_own_request(rng):
    forms = Forms(pb.AssignTargetsRequest)
    for _ in range(4):
        images = [scene(rng, (64, 96), 4), scene(rng, (64, 96), 2)]
        assert_reads_as_protobuf(forms, pb.AssignTargetsRequest, assign_request(images).SerializeToString())


@pytest.mark.parametrize("at", ["payload", "elsewhere"])
def test_stand_ins_of_a_senders_own_making_stand_for_nothing(rng, at):
    request = focal(rng)
    inputs = request.items[0].focal.inputs
    forged = _MARKER + (0).to_bytes(8, "little")
    if at == "payload":
        inputs.inline = forged + inputs.inline[len(forged) :]
    data = request.SerializeToString()
    if at == "elsewhere":
        data += varint(999 << 3 | 2) + varint(len(forged)) + forged
    forms = Forms(pb.ComputeLossRequest)
    for _ in range(3):
        assert_reads_as_protobuf(forms, pb.ComputeLossRequest, data)


@pytest.mark.parametrize(("count", "most"), [(1, 1), (4, 4), (5, 8 + 100 // 8), (12, 8 + 240 // 8)])
def test_a_few_forms_may_take_turns_and_more_are_seldom_learned(rng, monkeypatch, count, most):
    learned = []
    cut_out = module.cut_out
    monkeypatch.setattr(module, "cut_out", lambda *given: learned.append(1) or cut_out(*given))
    forms = Forms(pb.ComputeLossRequest)
    for turn in range(20 * count):
        request = focal(rng)
        request.gradient_dtype = turn % count + 1  # of one length and beginning
        assert_reads_as_protobuf(forms, pb.ComputeLossRequest, request.SerializeToString())
    assert len(learned) <= most


def test_what_is_known_again_earns_new_forms(rng):
    forms = Forms(pb.ComputeLossRequest)
    for dtype in range(1, 12):
        request = focal(rng)
        request.gradient_dtype = dtype
        known = [forms.read(request.SerializeToString()).form is not None for _ in range(9)]
        assert known[-1]


def test_of_what_comes_once_the_oldest_is_forgotten(rng):
    forms = Forms(pb.AssignTargetsRequest)
    again = assign_request([scene(rng, (64, 96), 1)]).SerializeToString()
    is_known = []
    for boxes in range(2, 5 * module._MOST_KEPT):
        forms.read(assign_request([scene(rng, (64, 96), boxes)]).SerializeToString())
        if boxes % 50 == 0:
            is_known.append(forms.read(again).form is not None)
    assert is_known == [False, *[True] * (len(is_known) - 1)]
    assert len(forms._known) == module._MOST_KEPT


def test_the_forms_of_one_length_and_beginning_are_few(rng):
    forms = Forms(pb.ComputeLossRequest)
    for dtype in [1, *range(1, 9)]:
        request = focal(rng)
        request.gradient_dtype = dtype
        forms.read(request.SerializeToString())
    (alike,) = forms._known.values()
    assert len(alike.forms) == module._MOST_ALIKE


def test_requests_on_a_stream_are_known_again_as_those_of_calls_are(rng):
    method = Method(name="ComputeLoss", forms=Forms(pb.ComputeLossRequest), answer=None)
    stream = StreamMethod(
        method=method, request=pb.ComputeLossStreamRequest, response=pb.ComputeLossStreamResponse
    )
    for mark in range(4):
        envelope = pb.ComputeLossStreamRequest(id=mark, request=focal(rng))
        found, request = stream.read(envelope.SerializeToString())
        assert found == mark
        assert_is(Parcel(request.message, request.payloads), envelope.request)
    assert request.form is not None
    assert method.forms.read(focal(rng).SerializeToString()).form is request.form


def test_a_large_tensor_on_a_stream_is_read_where_it_came():
    method = Method(name="ComputeLoss", forms=Forms(pb.ComputeLossRequest), answer=None)
    stream = StreamMethod(
        method=method, request=pb.ComputeLossStreamRequest, response=pb.ComputeLossStreamResponse
    )
    data = pb.ComputeLossStreamRequest(id=7, request=LARGE).SerializeToString()
    mark, request = stream.read(data)
    assert mark == 7
    views = [memoryview(buffer).obj for buffer in request.payloads.buffers]
    assert len(views) == 2
    assert all(view is data for view in views)


FINE = pb.ComputeLossRequest(gradients=[""] * (module._MOST_FIELDS + 1))
LONG = pb.ComputeLossRequest(gradients=["x" * module._MOST_FIXED_BYTES])
LARGE = loss_request(
    CASES["focal"].config, [{"inputs": np.zeros((1 << 16, 1), np.float32), "targets": np.zeros(1 << 16, int)}]
)


@pytest.mark.parametrize("request_", [FINE, LONG, LARGE], ids=["fine", "long", "large"])
def test_what_is_better_parsed_is_parsed(request_):
    forms, data = Forms(pb.ComputeLossRequest), request_.SerializeToString()
    assert [forms.read(data).form for _ in range(3)] == [None] * 3


def test_threads_forget_together(rng, monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    forms = Forms(pb.AssignTargetsRequest)
    several = [assign_request([scene(rng, (64, 96), n)]).SerializeToString() for n in range(1, 9)]
    run_together(lambda: [forms.read(data) for data in several * 300])
    assert len(forms._known) <= 3


def test_values_are_checked_in_every_request_of_a_form(stub, rng):
    for labels in ([0, 1], [1, 0], [0, 9], [1, 1]):
        arrays = {"inputs": rng.normal(size=(2, 3)).astype(np.float32), "targets": np.array(labels)}
        request = loss_request(CASES["focal"].config, [arrays])
        if 9 not in labels:
            (result,) = stub.ComputeLoss(request).results
            assert same_bits(result.loss, evaluate_locally(CASES["focal"], arrays).loss)
            continue
        found = refusal(stub.ComputeLoss, request)
        assert (found.reason, found.violations) == ("LABEL_OUT_OF_RANGE", ("items[0].focal.targets",))


def test_boxes_are_checked_in_every_request_of_a_form(stub):
    for corner in (40.0, 50.0, 60.0, -1.0, 45.0):
        image = {"boxes": np.array([[0, 0, corner, corner]], np.float32), "labels": np.array([3])}
        if corner > 0:
            (result,) = stub.AssignTargets(assign_request([image])).results
            assert sum(result.positive_counts) > 0
            continue
        found = refusal(stub.AssignTargets, assign_request([image]))
        assert found.violations == ("items[0].ground_truth[0].boxes",)


def test_what_does_not_go_together_is_refused_however_often_it_comes(stub):
    arrays = {"inputs": np.zeros((2, 3), np.float32), "targets": np.zeros(3, np.int64)}
    for _ in range(4):
        found = refusal(stub.ComputeLoss, loss_request(CASES["focal"].config, [arrays]))
        assert (found.reason, found.violations) == ("INVALID_SHAPE", ("items[0].focal.targets",))


@pytest.mark.parametrize("name", CASES)
def test_each_loss_has_its_numbers_whenever_it_comes(stub, rng, name):
    case = CASES[name]
    for _ in range(4):
        arrays = case.arrays(rng, 4)
        request = loss_request(case.config, [arrays], gradients=case.module.differentiable)
        (result,) = stub.ComputeLoss(request).results
        assert same_bits(result.loss, evaluate_locally(case, arrays).loss)


def test_threads_learn_a_form_together(rng):
    forms = Forms(pb.ComputeLossRequest)
    every = [focal(rng).SerializeToString() for _ in range(8)]
    run_together(
        lambda: [assert_reads_as_protobuf(forms, pb.ComputeLossRequest, data) for data in every * 20]
    )


def run_together(work):
    """Has four threads do the same at the same time, and change often; what one of them raises is raised."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work) for _ in range(4)]:
                done.result(60)
    finally:
        sys.setswitchinterval(usual)
