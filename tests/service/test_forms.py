"""Requests that are known again: what they hold is what protobuf says, and all is checked every time."""

import threading

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
from tests.domain.oracle_wire import whole
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
    found = whole(Parcel(request.message, request.payloads))
    # Bytes, not messages: NaN is not equal to itself, and unknown fields count.
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


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


def test_what_is_kept_is_bounded(rng):
    forms = Forms(pb.AssignTargetsRequest)
    for _ in range(2):
        for boxes in range(2 * module._MOST_KEPT):
            forms.read(assign_request([scene(rng, (64, 96), boxes)]).SerializeToString())
    assert len(forms._known) == module._MOST_KEPT
    items = focal(rng)
    items.items.extend([items.items[0]] * 200)
    large = Forms(pb.ComputeLossRequest)
    assert [large.read(items.SerializeToString()).form for _ in range(3)] == [None] * 3


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
    start, failed = threading.Barrier(4), []

    def read():
        start.wait()
        try:
            for data in every * 20:
                assert_reads_as_protobuf(forms, pb.ComputeLossRequest, data)
        except BaseException as error:  # noqa: BLE001  # looked at below
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
