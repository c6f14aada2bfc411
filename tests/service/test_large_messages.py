"""Messages whose tensors stay where they were received: 50 MiB both ways, and what is wrong with such."""

import grpc
import numpy as np
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.wire import LARGE_BYTES, Payloads
from lossd_server.rpc.bodies import Body
from tests.service.support import CASES, evaluate_locally, good_loss_request, loss_request, refusal, same_bits

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/lossd.v1.LossService/ComputeLoss"


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.addresses[0], options=UNLIMITED) as made:
        yield made


def logits_request(shape):
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.standard_normal(shape, np.float32),
        "targets": rng.integers(-1, shape[1], (shape[0], *shape[2:])),
    }
    return arrays, loss_request(losses_pb2.FocalLoss(), [arrays], gradients=["inputs"])


def test_50_mib_from_stock_protobuf_and_back(channel):
    arrays, request = logits_request((16, 80, 100, 103))
    assert request.ByteSize() > 50 << 20
    call = channel.unary_unary(
        METHOD,
        request_serializer=pb.ComputeLossRequest.SerializeToString,
        response_deserializer=pb.ComputeLossResponse.FromString,
    )
    (result,) = call(request).results
    expected = evaluate_locally(CASES["focal"], arrays, gradients=("inputs",))
    assert same_bits(result.loss, expected.loss)
    assert same_bits(result.gradients[0].tensors[0], expected.gradients["inputs"])


def test_odd_forms_of_a_large_request_mean_the_same(channel):
    _, request = logits_request((2, 80, 40, 40))
    call = channel.unary_unary(METHOD, response_deserializer=pb.ComputeLossResponse.FromString)
    plain = request.SerializeToString()
    expected = call(plain).results
    config = pb.ComputeLossRequest(focal=request.focal, gradients=request.gradients).SerializeToString()
    items = pb.ComputeLossRequest(items=request.items).SerializeToString()
    unknown = b"\xfa\x7f\x05extra"
    for form in (plain + unknown, unknown + plain, items + config, config + items):
        assert call(form).results == expected


@pytest.mark.parametrize("cut", [1, LARGE_BYTES, 1_000_000])
def test_a_large_request_that_is_cut_short_is_malformed(stub, channel, cut):
    data = logits_request((2, 80, 40, 60))[1].SerializeToString()
    found = refusal(channel.unary_unary(METHOD), data[:-cut])
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert stub.ComputeLoss(good_loss_request()).results


def test_a_large_tensor_of_the_wrong_length_is_refused_by_its_true_length(stub, channel):
    _, request = logits_request((2, 80, 40, 60))
    request.items[0].focal.inputs.shape[0] = 3
    call = channel.unary_unary(METHOD, request_serializer=pb.ComputeLossRequest.SerializeToString)
    found = refusal(call, request)
    assert (found.reason, found.metadata["field"]) == ("INVALID_TENSOR", "items[0].focal.inputs")
    assert found.metadata["length"] == str(2 * 80 * 40 * 60 * 4)
    assert stub.ComputeLoss(good_loss_request()).results


def test_a_forged_stand_in_beside_a_large_tensor_is_refused_by_its_length(stub, channel):
    _, request = logits_request((2, 80, 40, 60))
    forged = Payloads().add(b"")
    request.items.add().focal.inputs.CopyFrom(request.items[0].focal.inputs)
    request.items[1].focal.inputs.inline = forged
    request.items[1].focal.targets.CopyFrom(request.items[0].focal.targets)
    call = channel.unary_unary(METHOD, request_serializer=pb.ComputeLossRequest.SerializeToString)
    found = refusal(call, request)
    assert (found.reason, found.metadata["length"]) == ("INVALID_TENSOR", str(len(forged)))
    assert stub.ComputeLoss(good_loss_request()).results


def test_bytes_are_taken_out_of_what_grpc_holds():
    body = Body(b"abc")
    assert len(body) == 3
    assert body.take() == b"abc"
    assert body.take() == b""
