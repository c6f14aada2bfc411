"""Requests whose tensors lie in shared memory give what others give, whatever their owner does meanwhile."""

import threading

import grpc
import numpy as np
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.rpc import decode
from tests.domain.regions import wait_until
from tests.service import custom_modules, support
from tests.service.sharing import REGION_BYTES, answer_inline, focal, shared, sharing_caller, tensors_of
from tests.service.support import (
    CASES,
    FLOATS,
    assign_request,
    focal_arrays,
    focal_grid_arrays,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
    scene,
)

TIMES_UNTIL_KNOWN = 4
"""Of a request, until it is answered by what was learned from it."""


def same_answer(caller, request):
    """Whether a request is answered in shared memory as in messages, also when it is known from before."""
    inline, again = caller.stub.ComputeLoss(request), shared(caller, request)
    inline.ClearField("timings")
    return all(
        answer_inline(caller, caller.stub.ComputeLoss(again)) == inline for _ in range(TIMES_UNTIL_KNOWN)
    )


@pytest.mark.parametrize("name", CASES)
def test_every_loss_gives_the_same_bits(caller, name):
    case, rng = CASES[name], np.random.default_rng(1)
    items = [case.arrays(rng, n) for n in (3, 1, 4)]
    request = loss_request(case.config, items, gradients=case.module.differentiable)
    assert same_answer(caller, request)


@pytest.mark.parametrize("gradient_dtype", FLOATS.values())
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_gives_the_same_bits(caller, dtype, gradient_dtype):
    arrays = focal_grid_arrays(np.random.default_rng(2), 3)
    arrays["inputs"] = arrays["inputs"].astype(support.BFLOAT16 if dtype == "bfloat16" else dtype)
    request = loss_request(
        losses_pb2.FocalLoss(), [arrays], gradients=["inputs"], gradient_dtype=gradient_dtype
    )
    assert same_answer(caller, request)


def test_a_custom_loss_gives_the_same_bits(caller):
    rng = np.random.default_rng(3)
    arrays = {"pred": support.floats(rng, (4, 3)), "target": support.floats(rng, (4, 3))}
    request = loss_request(losses_pb2.CustomLoss(name="Squared"), [arrays], gradients=["pred"])
    assert same_answer(caller, request)


def test_places_may_be_given_for_some_gradients(caller):
    case = CASES["fcos-dense"]
    request = loss_request(
        case.config, [case.arrays(np.random.default_rng(4), 2)], gradients=case.module.differentiable
    )
    inline = caller.stub.ComputeLoss(request)
    inline.ClearField("timings")
    caller.add_output(request.items[0], "reg_preds", request.items[0].fcos.reg_preds)
    response = caller.stub.ComputeLoss(request)
    kinds = [g.tensors[0].WhichOneof("storage") for g in response.results[0].gradients]
    assert kinds == ["inline", "shared", "inline"]
    for tensor in response.results[0].gradients[1].tensors:
        tensor.CopyFrom(caller.read(tensor))
    response.ClearField("timings")
    assert response == inline


def test_ground_truth_to_be_assigned_may_be_shared(caller):
    request = assign_request([scene(np.random.default_rng(5), (64, 96))])
    inline = caller.stub.AssignTargets(request)
    for tensor in tensors_of(request).values():
        caller.share(tensor)
    response = caller.stub.AssignTargets(request)
    assert response.results == inline.results


def test_on_a_stream(caller):
    request = loss_request(
        losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(6), 9)], gradients=["inputs"]
    )
    bad = shared(caller, request)
    bad.items[0].focal.inputs.shared.offset = 8
    requests = (bad, shared(caller, request))
    messages = [pb.ComputeLossStreamRequest(id=i, request=r) for i, r in enumerate(requests)]
    refused, answered = sorted(caller.stub.ComputeLossStream(iter(messages)), key=lambda answer: answer.id)
    assert (refused.error.reason, refused.error.field) == (
        pb.ERROR_REASON_INVALID_SLICE,
        "items[0].focal.inputs.shared",
    )
    inline = caller.stub.ComputeLoss(request)
    assert answer_inline(caller, answered.response).results == inline.results


def test_labels_are_those_that_were_checked(caller):
    # Another thread turns all labels into nonsense and back as fast as it can, while they are checked.
    request, item = focal(caller)
    place = item.focal.targets.shared.offset
    labels = caller.memory[place : place + 40 * 8].view(np.int64)
    good, done = labels.copy(), threading.Event()

    def meddle():
        while not done.is_set():
            labels[:] = 1 << 40
            labels[:] = good

    meddling = threading.Thread(target=meddle)
    meddling.start()
    try:
        outcomes = [outcome(caller.stub, request) for _ in range(200)]
    finally:
        done.set()
        meddling.join(30)
    assert set(outcomes) <= {"answered", "LABEL_OUT_OF_RANGE"}


def outcome(stub, request):
    try:
        stub.ComputeLoss(request)
    except grpc.RpcError as error:
        return support.refusal_of(error).reason
    return "answered"


def test_predictions_may_be_anything_at_any_time(caller):
    request, item = focal(caller)
    place = item.focal.inputs.shared.offset
    memory, done = caller.memory[place : place + 800], threading.Event()
    rng = np.random.default_rng(9)

    def meddle():
        while not done.is_set():
            memory[:] = rng.integers(0, 256, 800)

    meddling = threading.Thread(target=meddle)
    meddling.start()
    try:
        assert {outcome(caller.stub, request) for _ in range(200)} == {"answered"}
    finally:
        done.set()
        meddling.join(30)


@pytest.mark.parametrize("times", [1, TIMES_UNTIL_KNOWN])
@pytest.mark.parametrize("places", [["inputs", "targets", "output"], ["targets", "output"], ["output"]])
def test_a_region_that_was_released_is_unknown(caller, places, times):
    request, item = focal(caller)
    for name in {"inputs", "targets"} - {*places}:
        tensor, place = getattr(item.focal, name), getattr(item.focal, name).shared
        length = 40 * (8 if name == "targets" else 20)
        tensor.inline = caller.memory[place.offset :][:length].tobytes()
    for _ in range(times):
        caller.stub.ComputeLoss(request)
    caller.peer.release(caller.region_id)
    refused = refusal(caller.stub.ComputeLoss, request)
    path = "items[0].outputs[0].slices[0]" if places[0] == "output" else f"items[0].focal.{places[0]}"
    assert (refused.reason, refused.violations) == ("UNKNOWN_REGION", (path,))


def test_what_a_known_request_names_is_checked_every_time(caller):
    request, item = focal(caller)
    place = item.focal.targets.shared.offset
    labels = caller.memory[place : place + 40 * 8].view(np.int64)
    for _ in range(TIMES_UNTIL_KNOWN):
        caller.stub.ComputeLoss(request)
    labels[7] = 1 << 40
    refused = refusal(caller.stub.ComputeLoss, request)
    assert (refused.reason, refused.violations) == ("LABEL_OUT_OF_RANGE", ("items[0].focal.targets",))
    labels[7] = 0
    assert caller.stub.ComputeLoss(request).results


def test_a_request_in_shared_memory_is_planned_once(caller, monkeypatch):
    planned, read = [], decode.read_loss_job
    monkeypatch.setattr(decode, "read_loss_job", lambda *given: planned.append(given) or read(*given))
    request, _ = focal(caller)
    for _ in range(3 * TIMES_UNTIL_KNOWN):
        caller.stub.ComputeLoss(request)
    assert len(planned) < TIMES_UNTIL_KNOWN


@pytest.mark.parametrize("times", [0, TIMES_UNTIL_KNOWN])
def test_a_caller_over_tcp_shares_nothing(both, caller, times):
    request, item = focal(caller)
    for _ in range(times):
        caller.stub.ComputeLoss(request)
    with grpc.insecure_channel(both.addresses[1]) as channel:
        stub = LossServiceStub(channel)
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.shared_memory_socket, info.max_shared_bytes) == ("", 0)
        assert refusal(stub.ComputeLoss, request).reason == "UNKNOWN_REGION"
        item.ClearField("focal")
        item.focal.CopyFrom(good_loss_request().items[0].focal)
        refused = refusal(stub.ComputeLoss, request)
    assert (refused.reason, refused.violations) == ("UNKNOWN_REGION", ("items[0].outputs[0].slices[0]",))


def test_the_server_says_where_it_takes_memory(both, caller):
    info = caller.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert info.shared_memory_socket == f"{both.addresses[0].removeprefix('unix:')}.shm"
    assert info.max_shared_bytes == 2 * REGION_BYTES


def test_a_server_that_shares_nothing(tmp_path):
    listen = f"unix:{tmp_path / 'lossd.sock'}"
    with make_server(listen=(listen,), max_shared_bytes=0) as server, support.connect(server) as stub:
        assert stub.GetServerInfo(pb.GetServerInfoRequest()).shared_memory_socket == ""
        assert len(list(tmp_path.iterdir())) == 1
        request = good_loss_request()
        request.items[0].focal.inputs.shared.region_id = bytes(16)
        assert refusal(stub.ComputeLoss, request).reason == "UNKNOWN_REGION"


def test_a_stopped_server_leaves_no_socket(tmp_path):
    with make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",)) as server, sharing_caller(server) as caller:
        assert (tmp_path / "lossd.sock.shm").is_socket()
        server.stop()
        assert caller.peer.hear() is None
    assert not (tmp_path / "lossd.sock.shm").exists()


def test_shared_memory_is_measured(tmp_path):
    with make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",)) as server:
        read = server._metrics.registry.get_sample_value
        assert read("lossd_shared_memory_bytes") == 0
        with sharing_caller(server):
            assert read("lossd_shared_memory_bytes") == REGION_BYTES


def sharing_server(tmp_path):
    load = ("tests.service.custom_modules:Held",)
    return make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), load=load)


def test_a_caller_that_leaves_the_queue_leaves_no_memory(tmp_path, held):
    with sharing_server(tmp_path) as server, support.connect(server) as stub:
        waiting = held(stub)
        with sharing_caller(server) as caller:
            request, _ = focal(caller)
            call = caller.stub.ComputeLoss.future(request)  # behind the one that is held
            wait_until(lambda: server._engine.waiting_count)
            call.cancel()
        regions = server._sharing.regions
        wait_until(lambda: (regions.count, regions.held_bytes) == (0, 0))
        assert not waiting.done()
        custom_modules.release.set()
        waiting.result(30)
        assert len(stub.ComputeLoss(good_loss_request()).results) == 1


def test_a_caller_that_leaves_in_the_middle(tmp_path, held):
    with sharing_server(tmp_path) as server, support.connect(server) as stub:
        with sharing_caller(server) as caller:
            request = loss_request(losses_pb2.CustomLoss(name="Held"), [{"pred": np.ones(2, np.float32)}])
            custom_modules.entered.clear()
            call = caller.stub.ComputeLoss.future(shared(caller, request))
            assert custom_modules.entered.wait(30)
            call.cancel()
        regions = server._sharing.regions
        wait_until(lambda: regions.count == 0)
        assert regions.held_bytes == REGION_BYTES
        custom_modules.release.set()
        wait_until(lambda: regions.held_bytes == 0)
        assert len(stub.ComputeLoss(good_loss_request()).results) == 1
