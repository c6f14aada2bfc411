"""The envelopes of streams: what is written by hand is what protobuf reads, and the other way round."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossd.envelopes import envelope, opened
from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.wire import LARGE_BYTES, Parcel
from lossd.writing import message_field, placed, tags_of, tensor_field
from tests.domain.wire_bytes import message_bytes

REQUESTS = {
    pb.ComputeLossStreamRequest: pb.ComputeLossRequest,
    pb.AssignTargetsStreamRequest: pb.AssignTargetsRequest,
}
ANSWERS = {
    pb.ComputeLossStreamResponse: pb.ComputeLossResponse,
    pb.AssignTargetsStreamResponse: pb.AssignTargetsResponse,
}
MARKS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 300))
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def kinds(envelopes):
    return pytest.mark.parametrize(
        ("kind", "content"), envelopes.items(), ids=lambda kind: kind.DESCRIPTOR.name
    )


def content_of(message):
    return message.request if "Request" in message.DESCRIPTOR.name else message.response


def exact(message):
    return message.SerializeToString(deterministic=True)


def taken_out(data):
    """The mark and the content of an envelope; None where it is left to protobuf."""
    parts = opened(data)
    return None if parts is None else (parts[0], data[parts[1] :])


@kinds({**REQUESTS, **ANSWERS})
def test_what_is_written_is_the_envelope_that_protobuf_reads(kind, content):
    @many
    @given(MARKS, message_bytes(content.DESCRIPTOR))
    def agrees(mark, data):
        try:
            message = content.FromString(data)
        except DecodeError:
            return
        written = b"".join(placed(envelope(mark, [message.SerializeToString()])))
        read = kind.FromString(written)
        assert (read.id, exact(content_of(read))) == (mark, exact(message))
        assert taken_out(written) == (mark, message.SerializeToString())

    agrees()


@kinds(REQUESTS)
def test_what_is_opened_holds_what_protobuf_says(kind, content):
    @many
    @given(message_bytes(kind.DESCRIPTOR))
    def agrees(data):
        parts = taken_out(data)
        try:
            expected = kind.FromString(data)
        except DecodeError:
            assert parts is None or is_malformed(content, parts[1])
            return
        if parts is not None:
            assert parts[0] == expected.id
            assert exact(content.FromString(parts[1])) == exact(expected.request)

    agrees()


def is_malformed(kind, data):
    try:
        kind.FromString(data)
    except DecodeError:
        return True
    return False


@kinds(REQUESTS)
def test_an_envelope_of_protobufs_own_is_opened(kind, content):
    for mark in (0, 1, -1, 127, 128, 2**63 - 1, -(2**63)):
        data = kind(id=mark, request=content()).SerializeToString()
        assert taken_out(data) == (mark, b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08\x07",  # no request
        b"\x08",  # which ends within its mark
        b"\x12\x05\x08",  # and within its request
        b"\x08\x00\x12\x00",  # a mark of 0 that is written out
        b"\x08\x87\x00\x12\x00",  # a padded mark
        b"\x08\x07\x12\x80\x00",  # a padded length
        b"\x12\x00\x08\x07",  # the mark behind the request
        b"\x08\x07\x08\x08\x12\x00",  # two marks
        b"\x08\x07\x12\x00\x12\x00",  # a request in two parts
        b"\x08\x07\x12\x00\x18\x01",  # an unknown field
        b"\x08" + b"\xff" * 10 + b"\x12\x00",  # a mark of more than ten bytes
        b"\x08" + b"\xff" * 9 + b"\x7f\x12\x00",  # or of more than 64 bits
    ],
)
def test_anything_else_is_left_to_protobuf(data):
    assert opened(data) is None


@pytest.mark.parametrize("mark", [0, 5, 300, 2**20, -1])
def test_large_tensors_are_neither_copied_nor_moved_out_of_line(mark):
    array = np.arange(LARGE_BYTES, dtype=np.float32)
    for extra in range(4):
        request = pb.ComputeLossRequest(gradients=["n" * extra]).SerializeToString()
        logits = tensor_field(tags_of(losses_pb2.FocalInputs.DESCRIPTOR)["inputs"], array)
        item = message_field(tags_of(pb.LossItem.DESCRIPTOR)["focal"], logits)
        items = message_field(tags_of(pb.ComputeLossRequest.DESCRIPTOR)["items"], item)
        data = b"".join(placed(envelope(mark, [request, *items])))
        found, start = opened(data)
        assert found == mark
        read = Parcel.read(pb.ComputeLossRequest, memoryview(data)[start:])
        view = unpack(read.message.items[0].focal.inputs, read.payloads)
        assert np.array_equal(view, array)
        begins = view.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).ctypes.data
        assert 0 < begins < len(data)
