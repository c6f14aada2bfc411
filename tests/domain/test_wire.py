"""Messages are read as the official runtime reads them, and nothing is copied that need not be."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossd import wire
from lossd.tensors import pack, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Parcel, Payloads
from tests.domain.oracle_wire import HOT, assert_agrees, whole
from tests.domain.wire_bytes import message_bytes, varint

MEBIBYTE = 1 << 20
LARGE = wire.LARGE_BYTES


@pytest.fixture
def _everything_is_large(monkeypatch):
    """A few bytes are a payload, and no message is too fine to be walked."""
    monkeypatch.setattr(wire, "LARGE_BYTES", 8)
    monkeypatch.setattr(wire, "_MINIMUM_STEPS", 1 << 20)


small_is_large = pytest.mark.usefixtures("_everything_is_large")
hot = pytest.mark.parametrize("kind", HOT, ids=lambda kind: kind.DESCRIPTOR.name)
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@small_is_large
@hot
def test_reads_what_protobuf_reads(kind):
    @many
    @given(message_bytes(kind.DESCRIPTOR))
    def agrees(data):
        assert_agrees(kind, data)

    agrees()


@small_is_large
@hot
def test_mutated_bytes_are_the_same_message_or_the_same_error(kind):
    places = st.lists(st.tuples(st.integers(0, 2**16), st.integers(-1, 255)), min_size=1, max_size=3)

    @many
    @given(message_bytes(kind.DESCRIPTOR), places, st.integers(0, 3))
    def agrees(data, changes, cut):
        mutated = bytearray(data)
        for place, byte in changes:
            at = place % (len(mutated) + 1)
            mutated[at : at + 1] = b"" if byte < 0 else bytes([byte])
        assert_agrees(kind, bytes(mutated[: len(mutated) - cut]))

    agrees()


@small_is_large
@many
@given(st.binary(max_size=200))
def test_noise(data):
    assert_agrees(pb.ComputeLossRequest, data)


def tensor_bytes(count):
    return pack(np.arange(count, dtype=np.float32))


def request_of(*tensors):
    items = [pb.LossItem(focal=losses_pb2.FocalInputs(inputs=tensor)) for tensor in tensors]
    return pb.ComputeLossRequest(focal=losses_pb2.FocalLoss(), items=items)


def test_only_large_payloads_stay_behind():
    data = request_of(tensor_bytes(LARGE), tensor_bytes(10), tensor_bytes(LARGE // 4 - 1)).SerializeToString()
    parcel = Parcel.read(pb.ComputeLossRequest, data)
    assert len(parcel.payloads) == 1
    assert parcel.message.ByteSize() < LARGE + 200
    for item in parcel.message.items:
        array = unpack(item.focal.inputs, parcel.payloads)
        assert np.array_equal(array, np.arange(array.size, dtype=np.float32))


def split_tensor(*parts):
    """One tensor in several parts: protobuf merges them."""
    inputs = b"".join(b"\x0a" + varint(len(part)) + part for part in parts)
    focal = b"\x0a" + varint(len(inputs)) + inputs
    return b"\x32" + varint(len(focal)) + focal


def inline(content):
    return tensor_pb2.Tensor(inline=content).SerializeToString()


@pytest.mark.parametrize(
    ("parts", "storage"),
    [
        ([inline(b"a" * LARGE), inline(b"b" * LARGE)], b"b" * LARGE),
        ([inline(b"a" * LARGE), inline(b"b")], b"b"),
        ([inline(b"a"), inline(b"b" * LARGE)], b"b" * LARGE),
        ([inline(b"a" * LARGE), inline(b"")], b""),
        ([inline(b"a" * LARGE) + inline(b"b" * LARGE)], b"b" * LARGE),
        ([inline(b"a" * LARGE), b"\x22\x00"], None),
        ([b"\x22\x00", inline(b"a" * LARGE), b"\x08\x01"], b"a" * LARGE),
    ],
)
def test_the_last_storage_wins(parts, storage):
    data = split_tensor(*parts)
    parcel = Parcel.read(pb.ComputeLossRequest, data)
    tensor = parcel.message.items[0].focal.inputs
    assert len(parcel.payloads) > 0
    assert tensor.WhichOneof("storage") == ("shared" if storage is None else "inline")
    assert bytes(parcel.payloads.get(tensor.inline)) == (storage or b"")
    assert_agrees(pb.ComputeLossRequest, data)


def test_a_payload_in_an_unknown_group_is_no_payload():
    item = split_tensor(inline(b"a" * LARGE))
    group = varint(40 << 3 | 3) + item + varint(40 << 3 | 4)
    parcel = Parcel.read(pb.ComputeLossRequest, group + item)
    assert len(parcel.payloads) == 1
    assert_agrees(pb.ComputeLossRequest, group + item)


@pytest.mark.parametrize("where", ["inline", "name"])
def test_a_forged_stand_in_is_what_it_is(where):
    forged = Payloads().add(b"nothing")
    request = request_of(tensor_bytes(LARGE))
    if where == "inline":
        request.items.add().focal.inputs.inline = forged
    else:
        request.gradients.append(wire._MARKER[1:].decode())
        request.items.add().focal.inputs.inline = wire._MARKER
    parcel = Parcel.read(pb.ComputeLossRequest, request.SerializeToString())
    assert whole(parcel) == request
    assert_agrees(pb.ComputeLossRequest, request.SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\x01" * (8 * MEBIBYTE),  # the smallest fields there are
        b"\x32\x00" * (8 * MEBIBYTE),  # empty items
        b"\x0b" * (16 * MEBIBYTE),  # groups in groups
        b"\x32"
        + varint(16 * MEBIBYTE)
        + b"\x0a\x00" * (8 * MEBIBYTE),  # one item, its inputs set anew and anew
        b"\x32\xff\xff\xff\xff\x07" + bytes(16 * MEBIBYTE),  # a length beyond the end
        b"\x32" + b"\xff" * (16 * MEBIBYTE),  # a length without end
        bytes(16 * MEBIBYTE),
    ],
    ids=["numbers", "items", "groups", "inputs", "beyond", "endless", "zeros"],
)
def test_hostile_bytes_cost_no_more_than_protobuf_takes(data):
    tracemalloc.start()
    try:
        walked = wire._without_payloads(pb.ComputeLossRequest.DESCRIPTOR, data, Payloads())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert walked is None or len(walked) == len(data)
    assert peak < len(data) + MEBIBYTE


def test_a_walk_gives_up_in_time(monkeypatch):
    looked_at = 0
    read = wire.read_varint

    def counted(*where):
        nonlocal looked_at
        looked_at += 1
        return read(*where)

    monkeypatch.setattr(wire, "read_varint", counted)
    data = b"\x32\x00" * (8 * MEBIBYTE)
    assert len(Parcel.read(pb.ComputeLossRequest, data).message.items) == 8 * MEBIBYTE
    assert looked_at < 4_000


def peak_of(call):
    """The result of a call, and the most memory that it took on the way."""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def address(array):
    return array.__array_interface__["data"][0]


def named_tensor(name, array):
    item = pb.LossItem()
    item.custom.tensors[name].CopyFrom(pack(array))
    return pb.ComputeLossRequest(items=[item])


@pytest.fixture(scope="module")
def array():
    """50 MiB."""
    return np.arange(50 * MEBIBYTE // 4, dtype=np.float32)


def test_what_is_received_is_not_copied(array):
    def read(data):
        parcel = Parcel.read(pb.ComputeLossRequest, data)
        (tensor,) = parcel.message.items[0].custom.tensors.values()
        return unpack(tensor, parcel.payloads)

    aligned = 0
    for length in range(1, 5):  # some name or other makes the elements lie as they should
        data = named_tensor("n" * length, array).SerializeToString()
        found, peak = peak_of(lambda data=data: read(data))
        begins = address(found) - address(np.frombuffer(data, np.uint8))
        assert np.array_equal(found, array)
        assert found.flags.aligned
        assert not found.flags.writeable
        if 0 <= begins < len(data):
            aligned += 1
            assert peak < MEBIBYTE
        else:
            assert peak < array.nbytes + MEBIBYTE
    assert aligned == 1


def test_payloads_can_be_let_go():
    parcel = Parcel.read(pb.ComputeLossRequest, request_of(tensor_bytes(LARGE)).SerializeToString())
    assert len(parcel.payloads) == 1
    parcel.payloads.clear()
    assert len(parcel.payloads) == 0
