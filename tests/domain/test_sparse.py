"""Sparse tensors: what is left out is exactly zero, and nothing else is taken for one."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lossd.sparse import is_smaller, sparse_tensor_field, unpack_sparse
from lossd.tensors import TensorError, pack
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Parcel
from lossd.writing import message_field, placed, size_of, tags_of, tensor_field

TAG = tags_of(pb.Gradient.DESCRIPTOR)["sparse"]
EXAMPLES = settings(max_examples=100, deadline=None)
TYPES = [np.dtype(name) for name in ("<f2", "<f4", "<f8")] + [np.dtype(ml_dtypes.bfloat16)]
ODD = st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 1e-8])


@st.composite
def tensors(draw):
    shape = draw(st.tuples(*(st.integers(0, 4) for _ in range(4))))
    rows = draw(arrays.arrays(np.float64, shape, elements=ODD))
    kept = draw(arrays.arrays(np.bool_, (shape[0], 1, *shape[2:])))
    return np.where(kept, rows, 0.0).astype(draw(st.sampled_from(TYPES)))


def places_of(array):
    """Places of the rows whose bits are not all zero: -0.0 is no zero here."""
    rows = np.ascontiguousarray(np.moveaxis(array, 1, -1)).view(f"u{array.itemsize}")
    return np.flatnonzero(rows.any(axis=-1))


def sparse_of(array):
    """The sparse tensor of an array, as protobuf reads what is written."""
    pieces = sparse_tensor_field(TAG, array, places_of(array))
    (sparse,) = pb.Gradient.FromString(b"".join(placed(pieces))).sparse
    return sparse


@EXAMPLES
@given(tensors(), st.booleans())
def test_a_tensor_comes_back_bit_for_bit(array, channels_last):
    if channels_last:
        array = np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    found = unpack_sparse(sparse_of(array), array.shape)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


@EXAMPLES
@given(tensors())
def test_what_is_smaller_is_smaller_on_the_wire(array):
    places = places_of(array)
    if is_smaller([array], [places]):
        assert size_of(sparse_tensor_field(TAG, array, places)) < size_of(tensor_field(TAG, array))


def test_rows_are_widened_on_the_way():
    array = np.zeros((1, 2, 3, 3), ml_dtypes.bfloat16)
    array[0, :, 1, 2] = 1.5, -0.0
    found = unpack_sparse(sparse_of(array), array.shape, None, np.dtype(np.float32))
    assert found.dtype == np.float32
    assert found.tobytes() == array.astype(np.float32).tobytes()


def test_large_rows_are_payloads():
    array = np.ones((2, 80, 50, 50), np.float32)
    rows = sparse_tensor_field(TAG, array, np.arange(5000))
    gradient = message_field(tags_of(pb.LossResult.DESCRIPTOR)["gradients"], rows)
    answer = message_field(tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"], gradient)
    read = Parcel.read(pb.ComputeLossResponse, b"".join(placed(answer)))
    assert len(read.payloads) == 1
    (sparse,) = read.message.results[0].gradients[0].sparse
    np.testing.assert_array_equal(unpack_sparse(sparse, array.shape, read.payloads), array)


SHAPE = (2, 3, 4, 5)


def sparse_tensor(places, values=None, shape=SHAPE):
    values = np.ones((len(places), 3), np.float32) if values is None else values
    return pb.SparseTensor(shape=shape, places=pack(np.asarray(places)), values=pack(values))


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        (sparse_tensor(np.array([0, 40], np.int32)), "places are 0 to 40, want 0..39"),
        (sparse_tensor(np.array([-1, 3], np.int32)), "places are -1 to 3, want 0..39"),
        (sparse_tensor(np.array([3, 99, 7], np.int64)), "not in order"),
        (sparse_tensor(np.array([3, 3], np.int64)), "not in order"),
        (sparse_tensor(np.array([5, 3], np.int64)), "not in order"),
        (sparse_tensor(np.array([1, 2], np.int64), np.ones((1, 3))), "values are [1, 3], want [2, 3]"),
        (sparse_tensor(np.array([1, 2], np.int64), np.ones((2, 4))), "values are [2, 4], want [2, 3]"),
        (sparse_tensor(np.array([1, 2], np.int64), np.ones(6)), "values are [6], want [2, 3]"),
        (sparse_tensor(np.array([1.0, 2.0])), "places are float64 [2], want int32 or int64 [P]"),
        (sparse_tensor(np.array([1, 2], np.uint64)), "places are uint64 [2]"),
        (sparse_tensor(np.array([[1], [2]])), "places are int64 [2, 1]"),
        (sparse_tensor(np.array([1]), shape=(2, 3, 4)), "shape is [2, 3, 4], want [2, 3, 4, 5]"),
        (sparse_tensor(np.array([1]), shape=(2**40, 3, 4, 5)), "want [2, 3, 4, 5]"),
        (pb.SparseTensor(shape=SHAPE), "dtype is 0"),
        (pb.SparseTensor(), "shape is [], want [2, 3, 4, 5]"),
    ],
)
def test_what_is_refused(sparse, message):
    with pytest.raises(TensorError) as caught:
        unpack_sparse(sparse, SHAPE)
    assert message in str(caught.value)


def test_only_maps_are_sparse():
    with pytest.raises(TensorError, match="shape is"):
        unpack_sparse(sparse_tensor(np.array([1]), shape=(2, 3)), (2, 3))
