"""The official runtime as the judge of the codec."""

from typing import Any

from google.protobuf.message import DecodeError

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Parcel, Payloads

HOT = (
    pb.ComputeLossRequest,
    pb.ComputeLossResponse,
    pb.ComputeLossStreamRequest,
    pb.ComputeLossStreamResponse,
    pb.AssignTargetsRequest,
    pb.AssignTargetsResponse,
    pb.AssignTargetsStreamRequest,
    pb.AssignTargetsStreamResponse,
    pb.ComputeLossInChunksRequest,
    pb.ComputeLossInChunksResponse,
)


def assert_agrees(kind: Any, data: bytes) -> None:
    """Reads bytes both ways: the same error, or the same message."""
    expected, found = _tried(kind.FromString, data), _tried(lambda d: Parcel.read(kind, d), data)
    assert (expected is None) == (found is None), "one of them is an error"
    if found is not None:
        assert_is(found, expected)


def assert_is(parcel: Parcel[Any], expected: Any) -> None:
    """A parcel holds what a message does."""
    found, known = whole(parcel), type(expected)()
    known.CopyFrom(expected)
    # Protobuf keeps an entry of a map that has unknown fields as one itself, and stand-ins in it stay there.
    for message in (found, known):
        message.DiscardUnknownFields()
    # Bytes, not messages: NaN is not equal to itself.
    assert found.SerializeToString(deterministic=True) == known.SerializeToString(deterministic=True)


def _tried(read: Any, data: bytes) -> Any:
    try:
        return read(data)
    except DecodeError:
        return None


def whole(parcel: Parcel[Any]) -> Any:
    """The message with its payloads in it."""
    message = type(parcel.message)()
    message.CopyFrom(parcel.message)
    _fill(message, parcel.payloads)
    return message


def _fill(message: Any, payloads: Payloads) -> None:
    if isinstance(message, tensor_pb2.Tensor):
        if message.WhichOneof("storage") == "inline":
            message.inline = bytes(payloads.get(message.inline))
        return
    if isinstance(message, pb.ComputeLossInChunksRequest | pb.ComputeLossInChunksResponse):
        message.data = bytes(payloads.get(message.data))
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            entries = value.values() if field.message_type.fields_by_name["value"].message_type else ()
        else:
            entries = value if field.is_repeated else [value]
        for entry in entries:
            _fill(entry, payloads)
