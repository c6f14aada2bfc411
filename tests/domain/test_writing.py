"""What is written by hand is what protobuf would have written, and lies as its reader wants it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossd import writing
from lossd.tensors import DTYPES, TensorError, pack, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import LARGE_BYTES, Parcel, Payloads
from lossd.writing import message_field, placed, shared_tensor_field, size_of, tags_of, tensor_field

MEBIBYTE = 1 << 20
REQUEST, ITEM = tags_of(pb.ComputeLossRequest.DESCRIPTOR), tags_of(pb.LossItem.DESCRIPTOR)
FCOS = tags_of(losses_pb2.FCOSInputs.DESCRIPTOR)
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def written(pieces):
    """The bytes of pieces, which are as many as was said before."""
    data = b"".join(placed(pieces))
    assert len(data) == size_of(pieces)
    return data


def request_of(arrays, *, name="", expected=False):
    """A request with some arrays, in pieces or as stock protobuf makes it."""
    if expected:
        inputs = losses_pb2.FCOSInputs(cls_preds=map(pack, arrays), reg_targets=map(pack, arrays[:2]))
        return pb.ComputeLossRequest(items=[pb.LossItem(fcos=inputs)] * 2, gradients=[name])
    inputs = [piece for array in arrays for piece in tensor_field(FCOS["cls_preds"], array)]
    inputs += [piece for array in arrays[:2] for piece in tensor_field(FCOS["reg_targets"], array)]
    item = message_field(REQUEST["items"], message_field(ITEM["fcos"], inputs))
    return [pb.ComputeLossRequest(gradients=[name]).SerializeToString(), *item, *item]


def arrays_of(data):
    parcel = Parcel.read(pb.ComputeLossRequest, data)
    return [
        unpack(tensor, parcel.payloads) for item in parcel.message.items for tensor in item.fcos.cls_preds
    ]


@pytest.fixture(params=["small", "viewed", "large"])
def _as(request, monkeypatch):
    """However few elements there are, they are copied, viewed or placed."""
    if request.param != "small":
        monkeypatch.setattr(writing, "_VIEWED_BYTES", 1)
    if request.param == "large":
        monkeypatch.setattr(writing, "LARGE_BYTES", 1)


@pytest.mark.usefixtures("_as")
@many
@given(st.data())
def test_is_what_protobuf_would_have_written(data):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    dtypes = st.sampled_from([*DTYPES.values(), np.dtype(">f4"), np.dtype(">i8")])
    arrays = data.draw(st.lists(st.builds(np.ones, shapes, dtypes), min_size=1, max_size=6))
    arrays = [array.T if data.draw(st.booleans()) else array for array in arrays]
    name = "n" * data.draw(st.integers(0, 5))
    found = pb.ComputeLossRequest.FromString(written(request_of(arrays, name=name)))
    assert found == request_of(arrays, name=name, expected=True)


@pytest.mark.usefixtures("_as")
def test_elements_in_any_order_are_written_in_theirs():
    array = np.arange(24, dtype=">i4").reshape(2, 3, 4)[::-1, :, ::2]
    (found,) = pb.SparseTargets.FromString(written(tensor_field(b"\x0a", array))).ListFields()
    assert np.array_equal(unpack(found[1]), array)


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("length", range(8))
def test_large_elements_lie_as_their_reader_wants_them(length, at):
    """Whatever comes before them: one tensor after the other, behind names of any length."""
    arrays = [np.arange(n, dtype=np.float32) for n in (LARGE_BYTES, LARGE_BYTES + 1)]
    arrays.insert(1, np.zeros(length, np.int8))
    data = written([bytes(at), *request_of(arrays, name="n" * length)])
    for found, array in zip(arrays_of(memoryview(data)[at:]), [*arrays, *arrays], strict=True):
        assert np.array_equal(found, array)
        if found.nbytes >= LARGE_BYTES:
            assert np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_what_is_sent_is_copied_once():
    array = np.arange(50 * MEBIBYTE // 4, dtype=np.float32)
    tracemalloc.start()
    try:
        data = b"".join(placed(tensor_field(b"\x0a", array)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) + MEBIBYTE
    assert np.array_equal(unpack(pb.SparseTargets.FromString(data).locations), array)


def test_elements_that_look_like_a_stand_in_are_elements():
    forged = np.frombuffer(Payloads().add(b"nothing"), np.uint8)
    large = np.zeros(LARGE_BYTES, np.uint8)
    found = arrays_of(written(request_of([forged, large])))
    assert np.array_equal(found[0], forged)
    assert np.array_equal(found[1], large)


def test_a_tensor_that_lies_elsewhere_is_named_by_its_place():
    place = tensor_pb2.SharedSlice(region_id=b"r" * 16, offset=128)
    data = shared_tensor_field(FCOS["cls_preds"], np.dtype("f4"), (2, 3), place.region_id, place.offset)
    (tensor,) = losses_pb2.FCOSInputs.FromString(data).cls_preds
    assert (tensor.dtype, tensor.shape, tensor.shared) == (tensor_pb2.DATA_TYPE_FLOAT32, [2, 3], place)


@pytest.mark.parametrize("array", [np.zeros(3, np.complex64), np.zeros((1,) * 33)])
@pytest.mark.usefixtures("_as")
def test_what_the_contract_does_not_know_is_refused(array):
    with pytest.raises(TensorError):
        tensor_field(b"\x0a", array)


@pytest.mark.parametrize("rows", [5, 5_000])
def test_masked_arrays_go_as_what_they_hold(rows):
    held = np.arange(rows * 5, dtype=np.float32).reshape(rows, 5)
    pieces = tensor_field(FCOS["cls_preds"], np.ma.masked_array(held, held % 2 == 0))
    (found,) = losses_pb2.FCOSInputs.FromString(written(pieces)).cls_preds
    assert np.array_equal(unpack(found), held)
