"""Bad input, one row each: its code, reason, field and values, and a live server after it."""

import os
from pathlib import Path

import grpc
import numpy as np
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service.bad_assignments import ASSIGN
from tests.service.bad_requests import CUSTOM, LOSS, Bad
from tests.service.custom_modules import ALL, SECRET
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
)

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def server():
    with make_server(load=ALL, max_message_bytes=MEBIBYTE) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with connect(server) as made:
        yield made


@pytest.fixture
def raw(server):
    """Calls a method with bytes, whatever they are."""
    with grpc.insecure_channel(server.addresses[0]) as channel:
        yield lambda method, data: channel.unary_unary(f"/lossd.v1.LossService/{method}")(data)


@pytest.fixture(autouse=True)
def _still_alive(stub):
    """After every bad request a good one must succeed on the same server."""
    yield
    assert len(stub.ComputeLoss(good_loss_request(), timeout=30).results) == 1
    assert len(stub.AssignTargets(good_assign_request(), timeout=30).results) == 1


def require(found, bad: Bad) -> None:
    assert (found.code.name, found.reason, found.domain) == (bad.code, bad.reason, "lossd")
    assert found.metadata.get("field", "") == bad.field
    if bad.code == "INVALID_ARGUMENT":
        assert found.violations == ((bad.field,) if bad.field else ())
    assert found.metadata.items() >= bad.metadata.items()
    assert found.message.startswith(bad.field)
    assert "Traceback" not in found.message
    assert found.retry_seconds is None
    for value in found.metadata.values():
        assert "/" not in value
        assert ".py" not in value


@pytest.mark.parametrize("bad", [*LOSS, *CUSTOM], ids=lambda bad: bad.name)
def test_loss_is_refused(stub, bad):
    require(refusal(stub.ComputeLoss, bad.request()), bad)


@pytest.mark.parametrize("bad", ASSIGN, ids=lambda bad: bad.name)
def test_assignment_is_refused(stub, bad):
    require(refusal(stub.AssignTargets, bad.request()), bad)


@pytest.mark.parametrize("extent", [2**15, 2**20, 2**40, 2**63 - 1])
def test_images_too_large_for_any_answer(stub, extent):
    request = good_assign_request()
    request.items[0].image_size.CopyFrom(pb.Size(height=extent, width=extent))
    found = refusal(stub.AssignTargets, request)
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert found.metadata["field"] in {"items", "items[0]", "items[0].image_size"}


@pytest.mark.parametrize("bad", LOSS, ids=lambda bad: bad.name)
def test_the_same_on_a_stream(stub, bad):
    request = pb.ComputeLossStreamRequest(id=5, request=bad.request())
    (answer,) = stub.ComputeLossStream(iter([request]))
    assert answer.id == 5
    assert answer.error.code == getattr(grpc.StatusCode, bad.code).value[0]
    assert pb.ErrorReason.Name(answer.error.reason) == f"ERROR_REASON_{bad.reason}"
    assert answer.error.field == bad.field
    assert answer.error.metadata.items() >= bad.metadata.items()


def test_second_item_is_named(stub):
    bad = good_loss_request()
    bad.items.append(bad.items[0])
    bad.items[1].focal.inputs.inline = b""
    found = refusal(stub.ComputeLoss, bad)
    assert found.violations == ("items[1].focal.inputs",)


JUNK = {
    "junk": b"\xff\xfe\xfd junk",
    "zeros": bytes(64),
    "truncated": good_loss_request().SerializeToString()[:-3],
    "length-beyond-the-end": b"\x32\xff\xff\xff\xff\x0f",
    "group-without-end": b"\x0b\x0b\x0b",
    "nested-without-end": b"\x0b" * 5000,
}


@pytest.mark.parametrize("method", ["ComputeLoss", "AssignTargets"])
@pytest.mark.parametrize("data", JUNK.values(), ids=JUNK)
def test_bytes_that_are_no_message(raw, method, data):
    found = refusal(raw, method, data)
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert found.metadata["length"] == str(len(data))
    assert found.metadata["type"] == f"lossd.v1.{method}Request"


@pytest.mark.parametrize(("method", "field"), [("ComputeLoss", "loss"), ("AssignTargets", "items")])
def test_empty_message(raw, method, field):
    found = refusal(raw, method, b"")
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MISSING_FIELD")
    assert found.violations == (field,)


@pytest.mark.parametrize("method", ["ComputeLoss", "AssignTargets", "GetServerInfo"])
def test_oversize_message(raw, method):
    found = refusal(raw, method, bytes(MEBIBYTE + 1))
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_of_exactly_the_limit_is_read(raw):
    found = refusal(raw, "ComputeLoss", bytes(MEBIBYTE))
    assert found.reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize("gradients", [(), ("pred",)], ids=["value", "gradient"])
def test_custom_loss_that_raises_says_nothing_of_its_insides(stub, gradients):
    request = custom("Raises", gradients=gradients)
    found = refusal(stub.ComputeLoss, request)
    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "CUSTOM_LOSS_FAILED")
    told = f"{found}"
    for secret in (SECRET, "swordfish", "Traceback", ".py", "tests", str(Path.cwd())):
        assert secret not in told


def test_custom_loss_that_exits_is_answered(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ComputeLoss(custom("Exits"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "swordfish" not in caught.value.details()


@pytest.mark.parametrize("gradients", [(), ("pred",)], ids=["value", "gradient"])
def test_custom_loss_that_returns_nan_is_answered_with_nan(stub, gradients):
    (result,) = stub.ComputeLoss(custom("NotANumber", gradients=gradients)).results
    assert np.isnan(np.frombuffer(result.loss.inline, np.float32)).all()
    for gradient in result.gradients:
        assert np.isnan(np.frombuffer(gradient.tensors[0].inline, np.float32)).all()
    assert len(result.gradients) == len(gradients)
    assert [found.input for found in result.non_finite] == ["loss"]


def test_custom_loss_that_returns_nan_is_refused_under_strictness(stub):
    found = refusal(stub.ComputeLoss, custom("NotANumber", strict=True))
    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "CUSTOM_LOSS_FAILED")
    assert stub.ComputeLoss(good_loss_request()).results


def custom(name: str, **settings) -> pb.ComputeLossRequest:
    config = losses_pb2.CustomLoss(name=name)
    return loss_request(config, [{"pred": np.ones((2, 3), np.float32)}], **settings)


def test_long_values_are_shortened(stub):
    found = refusal(stub.ComputeLoss, custom("x" * 100_000))
    assert found.reason == "UNKNOWN_CUSTOM_LOSS"
    assert len(found.metadata["value"]) <= 256
    assert len(found.message) < 1024


def test_text_of_the_caller_survives_in_the_answer(stub):
    found = refusal(stub.ComputeLoss, custom("naïve\n\x00 名前"))
    assert found.metadata["value"] == "naïve\n\x00 名前"


def test_nothing_is_leaked(stub):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208

    def refuse(count: int) -> None:
        rows = [*LOSS, *CUSTOM]
        for number in range(count):
            refusal(stub.ComputeLoss, rows[number % len(rows)].request())

    refuse(100)
    before = open_files(), threads()
    refuse(200)
    # gRPC's and the pool's own threads come as they are needed; a leak would be of hundreds.
    assert open_files() <= before[0] + 4
    assert threads() <= before[1] + 8
