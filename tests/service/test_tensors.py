"""A `Tensor` and its array say the same, and what means no array is refused."""

import math

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lossd import tensors
from lossd.tensors import DTYPES, TensorError, pack, unpack
from lossd.v1 import tensor_pb2 as pb

TYPES = [
    ("FLOAT32", "float32", 4),
    ("FLOAT64", "float64", 8),
    ("FLOAT16", "float16", 2),
    ("BFLOAT16", "bfloat16", 2),
    ("INT8", "int8", 1),
    ("INT16", "int16", 2),
    ("INT32", "int32", 4),
    ("INT64", "int64", 8),
    ("UINT8", "uint8", 1),
    ("UINT16", "uint16", 2),
    ("UINT32", "uint32", 4),
    ("UINT64", "uint64", 8),
    ("BOOL", "bool", 1),
]

shapes = npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)


def dtype_called(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@st.composite
def arrays(draw):
    """Any bits at all, NaNs with payloads included, of any type, shape, layout and byte order."""
    dtype = dtype_called(draw(st.sampled_from([name for _, name, _ in TYPES])))
    shape = draw(shapes)
    bits = np.dtype(f"u{dtype.itemsize}")
    elements = st.integers(0, 1) if dtype == np.bool_ else npst.from_dtype(bits)
    array = draw(npst.arrays(bits, shape, elements=elements)).view(dtype)
    if dtype.kind in "fiu" and draw(st.booleans()):
        array = array.astype(dtype.newbyteorder(">"))
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()):
        array = array.transpose()
    steps = [slice(None, None, draw(st.sampled_from([1, 2, -1, -2]))) for _ in shape]
    array = array[(*steps, ...)]
    if draw(st.booleans()):
        array.setflags(write=False)
    return array


def native_bits(array):
    """The elements as unsigned integers, by value and not by byte order."""
    bits = np.dtype(f"u{array.dtype.itemsize}").newbyteorder(array.dtype.byteorder)
    return np.ascontiguousarray(array).view(bits).astype(bits.newbyteorder("=")).reshape(array.shape)


def refusal(call):
    with pytest.raises(TensorError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert all(isinstance(value, str) for value in caught.value.values.values())
    return caught.value


@settings(max_examples=500, deadline=None)
@given(arrays())
def test_every_array_comes_back_bit_for_bit(array):
    message = pb.Tensor.FromString(pack(array).SerializeToString())
    result = unpack(message)
    assert result.shape == array.shape
    assert result.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(native_bits(result), native_bits(array))
    assert not result.flags.writeable
    assert pack(result) == message


@pytest.mark.parametrize(("enum", "name", "size"), TYPES)
def test_every_type_of_the_contract_has_its_number_of_bytes(enum, name, size):
    message = pack(np.ones((2, 3), dtype_called(name)))
    assert message.dtype == pb.DataType.Value(f"DATA_TYPE_{enum}")
    assert list(message.shape) == [2, 3]
    assert len(message.inline) == 6 * size
    assert unpack(message).dtype.name == name


def test_the_contract_has_no_other_type():
    assert {f"DATA_TYPE_{enum}" for enum, _, _ in TYPES} | {"DATA_TYPE_UNSPECIFIED"} == set(
        pb.DataType.keys()
    )
    assert len(DTYPES) == len(TYPES)


def test_elements_are_row_major_and_little_endian():
    expected = bytes.fromhex("0100 0200 0300 0400 0500 0600")
    array = np.array([[1, 2, 3], [4, 5, 6]], "<i2")
    for same in (array, array.astype(">i2"), np.asfortranarray(array), array[::-1, ::-1][::-1, ::-1]):
        assert pack(same).inline == expected
    assert pack(array.T).inline == bytes.fromhex("0100 0400 0200 0500 0300 0600")


def test_bfloat16_is_the_upper_half_of_a_float32():
    assert pack(np.array([1.5], ml_dtypes.bfloat16)).inline == np.float32(1.5).tobytes()[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("size", "bits"), [(2, 0x7C01), (4, 0xFF800001), (8, 0x7FF0_0000_0000_0BAD)])
def test_a_signalling_nan_keeps_its_payload(order, size, bits):
    array = np.array([bits], f"{order}u{size}").view(f"{order}f{size}")
    assert int.from_bytes(pack(array).inline, "little") == bits
    assert int.from_bytes(unpack(pack(array)).tobytes(), "little") == bits


def test_a_scalar_has_no_shape_and_one_element():
    message = pack(np.array(2.5, np.float32))
    assert list(message.shape) == []
    assert unpack(message).shape == ()
    assert unpack(message) == 2.5


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (0, 2**40), (0,) * 32])
def test_an_array_without_elements_keeps_its_shape(shape):
    result = unpack(pack(np.empty(shape, np.float32)))
    assert result.shape == shape


def test_a_tensor_without_elements_needs_no_storage():
    assert unpack(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[0, 4])).shape == (0, 4)


@pytest.mark.parametrize(("enum", "name", "size"), TYPES)
@pytest.mark.parametrize("surplus", [-1, 1])
def test_storage_of_the_wrong_length_is_refused(enum, name, size, surplus):
    dtype = pb.DataType.Value(f"DATA_TYPE_{enum}")
    data = bytes(6 * size + surplus)
    error = refusal(lambda: unpack(pb.Tensor(dtype=dtype, shape=[2, 3], inline=data)))
    assert error.reason == "INVALID_TENSOR"
    assert error.values == {
        "length": str(len(data)),
        "expected": str(6 * size),
        "dtype": name,
        "shape": "[2, 3]",
    }


@pytest.mark.parametrize("shape", [[], [1], [2, 3]])
def test_elements_without_storage_are_refused(shape):
    error = refusal(lambda: unpack(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=shape)))
    assert (error.reason, error.values["length"]) == ("INVALID_TENSOR", "0")


def test_storage_without_elements_is_refused():
    error = refusal(lambda: unpack(pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[0], inline=b"x")))
    assert (error.reason, error.values["expected"]) == ("INVALID_TENSOR", "0")


@pytest.mark.parametrize(
    ("shape", "axis", "extent"),
    [([-1], 0, -1), ([2, -3], 1, -3), ([-2, -3], 0, -2), ([0, -(2**63)], 1, -(2**63))],
)
def test_a_negative_extent_is_refused(shape, axis, extent):
    error = refusal(lambda: unpack(pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=shape, inline=b"123456")))
    assert error.reason == "INVALID_SHAPE"
    assert error.values == {"axis": str(axis), "extent": str(extent)}


@pytest.mark.parametrize(
    "shape",
    [[2**40, 2**40], [2**62, 2**62, 4], [0, 2**62, 2**62], [2**62, 2**62, 0], [0, 2**63 - 1], [2**32] * 4],
)
@pytest.mark.parametrize("dtype", [pb.DATA_TYPE_INT8, pb.DATA_TYPE_FLOAT64])
def test_extents_whose_product_overflows_are_refused(shape, dtype):
    error = refusal(lambda: unpack(pb.Tensor(dtype=dtype, shape=shape)))
    assert error.reason == "INVALID_SHAPE"
    assert error.values == {"shape": str(shape)}


@pytest.mark.parametrize("dimensions", [33, 64, 65, 100_000])
def test_too_many_dimensions_are_refused(dimensions):
    message = pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[1] * dimensions, inline=b"x")
    error = refusal(lambda: unpack(message))
    assert (error.reason, error.values) == ("INVALID_SHAPE", {"dimensions": str(dimensions)})


def test_as_many_dimensions_as_allowed_are_taken():
    shape = (1,) * tensors.MAX_DIMENSIONS
    assert unpack(pack(np.ones(shape))).shape == shape
    assert refusal(lambda: pack(np.ones((*shape, 1)))).reason == "INVALID_SHAPE"


@pytest.mark.parametrize("dtype", [pb.DATA_TYPE_UNSPECIFIED, 14, 99, -1, 2**31 - 1])
def test_a_type_that_the_contract_lacks_is_refused(dtype):
    error = refusal(lambda: unpack(pb.Tensor(dtype=dtype, shape=[1], inline=b"1234")))
    assert error.reason == "INVALID_DTYPE"
    assert error.values == {"dtype": str(dtype)}


def test_an_empty_message_is_refused():
    assert refusal(lambda: unpack(pb.Tensor())).reason == "INVALID_DTYPE"


@pytest.mark.parametrize(("data", "position", "value"), [(b"\2", 0, 2), (b"\0\1\1\xff\2", 3, 255)])
def test_a_bool_is_0_or_1(data, position, value):
    error = refusal(lambda: unpack(pb.Tensor(dtype=pb.DATA_TYPE_BOOL, shape=[len(data)], inline=data)))
    assert error.reason == "INVALID_TENSOR"
    assert error.values == {"position": str(position), "value": str(value)}


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, np.complex64),
        np.zeros(2, np.complex128),
        np.zeros(2, object),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, "timedelta64[s]"),
        np.zeros(2, [("x", "f4"), ("y", "f4")]),
        np.rec.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f4")]),
        np.array(["text"]),
        np.array([b"text"]),
        np.zeros(2, "V4"),
        np.zeros(2, np.longdouble),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.zeros(2, ml_dtypes.int4),
        np.array(["text"], np.dtypes.StringDType()),
    ],
    ids=lambda array: str(array.dtype),
)
def test_an_array_of_a_type_that_the_contract_lacks_is_refused(array):
    error = refusal(lambda: pack(array))
    assert error.reason == "INVALID_DTYPE"
    assert error.values == {"dtype": str(array.dtype)}


extents = st.one_of(
    st.integers(0, 4), st.sampled_from([-1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]), st.integers(-3, 70)
)
messages = st.builds(
    pb.Tensor,
    dtype=st.one_of(st.integers(0, 13), st.integers(-(2**31), 2**31 - 1)),
    shape=st.one_of(st.lists(extents, max_size=4), st.lists(st.sampled_from([0, 1]), max_size=70)),
    inline=st.one_of(st.none(), st.binary(max_size=64), st.integers(0, 64).map(bytes)),
)


def outcome(message):
    """Returns the array or the refusal; anything else that is raised fails the test."""
    try:
        return unpack(message)
    except TensorError as error:
        return error


@settings(max_examples=1500, deadline=None)
@given(messages)
@example(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT64, shape=[0, 2**58, 2]))
@example(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT64, shape=[2**59, 0]))
@example(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT64, shape=[2**59 + 1, 0]))
def test_any_message_is_an_array_or_a_tensor_error(message):
    result = outcome(message)
    if isinstance(result, TensorError):
        assert result.reason in {"INVALID_DTYPE", "INVALID_SHAPE", "INVALID_TENSOR"}
        assert str(result)
    else:
        assert list(result.shape) == list(message.shape)
        assert result.nbytes == len(message.inline) == math.prod(message.shape) * result.itemsize
        assert pack(result).inline == message.inline


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_that_parse_are_an_array_or_a_tensor_error(data):
    try:
        message = pb.Tensor.FromString(data)
    except DecodeError:
        return
    outcome(message)
