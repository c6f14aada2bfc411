"""One family of errors, whatever went wrong and wherever it was noticed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from lossd_client import (
    AccessError,
    Client,
    CustomLoss,
    DeadlineError,
    FCOSAssigner,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    InvalidInputError,
    LossdError,
    NotFoundError,
    ServerError,
    TooLargeError,
    UnavailableError,
)
from lossd_client._errors import error_of_call
from tests.service import custom_modules
from tests.service.support import fcos_truth_arrays, make_server

LOGITS, LABELS = np.zeros((2, 3), np.float32), np.array([0, 2])
PRED = {"pred": np.ones((2, 3), np.float32)}
UNUSED = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidInputError, ValueError),
        (NotFoundError, LookupError),
        (TooLargeError, Exception),
        (AccessError, PermissionError),
        (UnavailableError, ConnectionError),
        (DeadlineError, TimeoutError),
        (ServerError, Exception),
    ],
)
def test_the_family(kind, builtin):
    assert issubclass(kind, LossdError)
    assert issubclass(kind, builtin)


def caught(call, *arguments, **settings) -> LossdError:
    with pytest.raises(LossdError) as found:
        call(*arguments, **settings)
    assert found.value.message in str(found.value)
    return found.value


def test_invalid_input(client):
    error = caught(client.compute_loss, FocalLoss(), LOGITS, np.array([0, 3]))
    assert type(error) is InvalidInputError
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "LABEL_OUT_OF_RANGE"
    assert error.field == "items[0].focal.targets"
    assert error.value == "3"
    assert error.metadata == {"position": "[1]", "value": "3", "lowest": "-1", "highest": "2"}
    assert error.retry_after is None
    assert "LABEL_OUT_OF_RANGE" in str(error)
    assert "items[0].focal.targets" in str(error)


def test_the_item_of_a_batch_is_named(client):
    batch = [(LOGITS, LABELS), (LOGITS, LABELS), (LOGITS, LABELS[:1])]
    error = caught(client.compute_losses, FocalLoss(), batch)
    assert (error.field, error.reason) == ("items[2].focal.targets", "INVALID_SHAPE")


def test_not_found(client):
    error = caught(client.compute_loss, CustomLoss("Nowhere"), PRED)
    assert type(error) is NotFoundError
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_CUSTOM_LOSS")
    assert error.field == "custom.name"


def test_fault_of_a_custom_loss(client):
    error = caught(client.compute_loss, CustomLoss("Raises"), PRED)
    assert type(error) is ServerError
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "CUSTOM_LOSS_FAILED")
    assert custom_modules.SECRET not in str(error)


def test_too_large(client):
    error = caught(
        client.assign_targets, FCOSAssigner(), [{"boxes": [], "labels": []}], image_size=(60_000,) * 2
    )
    assert type(error) is TooLargeError
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


def test_unavailable():
    with Client(UNUSED, timeout=30) as client:
        error = caught(client.compute_loss, FocalLoss(), LOGITS, LABELS)
    assert type(error) is UnavailableError
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.UNAVAILABLE, "", "")
    assert error.metadata == {}


def test_no_lossd_there():
    """Some other gRPC server answers."""
    server = grpc.server(None)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout=30) as client:
            error = caught(client.compute_loss, FocalLoss(), LOGITS, LABELS)
        assert (type(error), error.code) == (ServerError, grpc.StatusCode.UNIMPLEMENTED)
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("by_call", [True, False])
def test_deadline(by_call):
    custom_modules.release.clear()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:
            client = Client(server.addresses[0], timeout=60 if by_call else 0.3)
            settings = {"timeout": 0.3} if by_call else {}
            error = caught(client.compute_loss, CustomLoss("Held"), PRED, **settings)
            assert (type(error), error.code) == (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED)
            custom_modules.release.set()
            client.close()
    finally:
        custom_modules.release.set()


def test_a_stopping_server_says_when_to_come_back(client):
    error = UnavailableError(grpc.StatusCode.UNAVAILABLE, "stopping", reason="DRAINING", retry_after=1.0)
    assert error.retry_after == 1
    assert error.value is None


FCOS = FCOSLoss(num_classes=3)


def truth_with(**image) -> list:
    preds = list(fcos_truth_arrays(np.random.default_rng(0), 1).values())[:3]
    return [*preds, [image]]


HERE = {
    "dtype": (
        FocalLoss(),
        [(LOGITS, LABELS), (LOGITS, ["a", "b"])],
        "items[1].focal.targets",
        "INVALID_DTYPE",
    ),
    "complex": (GIoULoss(), [(LOGITS + 1j, LOGITS)], "items[0].giou.pred_boxes", "INVALID_DTYPE"),
    "level": (
        FCOS,
        [([LOGITS, LOGITS.astype("M8[s]")], [], [], [])],
        "items[0].fcos.cls_preds[1]",
        "INVALID_DTYPE",
    ),
    "no-labels": (
        FCOS,
        [truth_with(boxes=[[0, 0, 1, 1]])],
        "items[0].fcos.ground_truth[0].labels",
        "MISSING_FIELD",
    ),
    "unknown-key": (
        FCOS,
        [truth_with(boxes=[[0, 0, 1, 1]], labels=[1], box=1)],
        "items[0].fcos.ground_truth[0].box",
        "UNEXPECTED_FIELD",
    ),
    "custom": (
        CustomLoss("Rows"),
        [({"pred": np.array(["a"])},)],
        "items[0].custom.tensors[pred]",
        "INVALID_DTYPE",
    ),
    "reduction": (FocalLoss(reduction="average"), [(LOGITS, LABELS)], "focal.reduction", "INVALID_OPTION"),
    "preset": (FCOSLoss(num_classes=3, preset="paper"), [truth_with()], "fcos.preset", "INVALID_OPTION"),
    "box-format": (
        FCOSLoss(num_classes=3, box_format="yxyx"),
        [truth_with()],
        "fcos.assigner.box_format",
        "INVALID_OPTION",
    ),
}


@pytest.mark.parametrize(("loss", "items", "field", "reason"), HERE.values(), ids=HERE)
def test_what_is_refused_before_it_is_sent_is_named_as_the_server_would(loss, items, field, reason):
    with Client(UNUSED, timeout=0.5) as client:
        error = caught(client.compute_losses, loss, items)
    assert (type(error), error.reason) == (InvalidInputError, reason)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == field
    assert error.message.startswith(field)


def test_a_gradient_type_that_the_contract_lacks(client):
    error = caught(
        client.compute_loss, FocalLoss(), LOGITS, LABELS, gradients=True, gradient_dtype=np.complex64
    )
    assert (error.reason, error.field) == ("INVALID_DTYPE", "gradient_dtype")


def test_normalizers_that_do_not_go_with_the_items(client):
    for normalizers in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="normalizers"):
            client.compute_losses(FocalLoss(), [(LOGITS, LABELS)] * 2, normalizers=normalizers)


def test_wrong_number_of_arguments_is_a_type_error(client):
    for arguments in ((), (LOGITS,), (LOGITS, LABELS, LABELS)):
        with pytest.raises((TypeError, InvalidInputError)):
            client.compute_loss(FocalLoss(), *arguments)
    with pytest.raises(TypeError):
        client.compute_loss(FCOS, [], [], [])
    with pytest.raises(TypeError):
        client.compute_loss(CustomLoss("Rows"))
    with pytest.raises(TypeError):
        FCOSLoss(num_classes=3, cls_weight=1.0, cls_loss_weight=1.0)


def pickled(error):
    return pickle.loads(pickle.dumps(error))  # noqa: S301  # its own


@pytest.mark.parametrize("again", [pickled, copy.copy])
def test_an_error_travels_between_processes(client, again):
    error = caught(client.compute_loss, FocalLoss(), LOGITS, np.array([0, 3]))
    other = again(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    for name in ("code", "reason", "message", "field", "value", "metadata", "retry_after"):
        assert getattr(other, name) == getattr(error, name)


class _Babble(grpc.GenericRpcHandler):
    """Answers every call with bytes that are no message."""

    def service(self, _details):
        return grpc.unary_unary_rpc_method_handler(lambda _data, _call: b"\xff\xff junk")


def test_an_answer_that_is_no_message_is_a_fault_of_the_server():
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((_Babble(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            error = caught(client.compute_loss, FocalLoss(), LOGITS, LABELS)
            assert type(error) is ServerError
            assert error.code is grpc.StatusCode.INTERNAL
            assert "7 bytes is no ComputeLossResponse" in error.message
    finally:
        server.stop(None).wait()


def test_a_call_that_was_cancelled_as_its_refusal_arrived_is_cancelled():
    """What gRPC then holds is its own code beside the server's details, which name another."""
    details = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="the server is stopping")

    class Cancelled:
        def code(self):
            return grpc.StatusCode.CANCELLED

        def details(self):
            return "Locally cancelled by application!"

        def trailing_metadata(self):
            return (("grpc-status-details-bin", details.SerializeToString()),)

    error = error_of_call(Cancelled())
    assert (error.code, error.reason) == (grpc.StatusCode.CANCELLED, "")


class _Reset:
    """What gRPC holds of a call whose stream was reset, and of one that failed with a reason of lossd's."""

    def __init__(self, reason, code="INTERNAL", details="Received RST_STREAM with error code 2"):
        self._code = grpc.StatusCode[code]
        self._details = details
        self._status = status_pb2.Status(code=self._code.value[0], message=details)
        if reason:
            self._status.details.add().Pack(error_details_pb2.ErrorInfo(domain="lossd", reason=reason))

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return (
            (("grpc-status-details-bin", self._status.SerializeToString()),) if self._status.details else ()
        )


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("INTERNAL", "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"),
        ("INTERNAL", "Internal error from Core"),
        ("CANCELLED", "CANCELLED"),
    ],
)
def test_a_call_that_others_cut_off_may_be_made_again_and_one_that_failed_may_not(code, details):
    error = error_of_call(_Reset("", code, details))
    assert (type(error), error.code) == (UnavailableError, grpc.StatusCode.UNAVAILABLE)
    assert error.message == details
    assert type(error_of_call(_Reset("INTERNAL", code, details))) is ServerError


@pytest.mark.parametrize("details", ["Channel closed!", "Locally cancelled by application!"])
def test_a_call_that_its_caller_ended_is_not_made_again(details):
    assert error_of_call(_Reset("", "CANCELLED", details)).code is grpc.StatusCode.CANCELLED
