"""Small calls whose layout is known are the same calls, byte for byte, and their answers mean the same."""

import copy
import pickle
import tracemalloc
from contextlib import suppress
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lossd.answers import shared_result_layout
from lossd.tensors import DTYPES, pack
from lossd.v1 import loss_service_pb2 as pb
from lossd.writing import message_field, placed, tags_of
from lossd_client import CenternessLoss, Client, FocalLoss, GIoULoss, InvalidInputError, ServerError
from lossd_client import _loss_requests as requests
from lossd_client import client as client_module
from lossd_client._layouts import AnswerLayout
from lossd_client._options import EvaluationOptions
from lossd_client._storage import LEAST_BYTES, Storage
from lossd_server.losses import LossOutcome, LossPreset, NonFinite
from lossd_server.rpc.encode import loss_result
from tests.client.damage import damaged
from tests.client.support import SIMPLE, same_bits
from tests.service.support import make_server

EXAMPLES = settings(max_examples=300, deadline=None)
LOSSES = [FocalLoss(), FocalLoss(alpha=None, gamma=1.5), GIoULoss(reduction="sum"), CenternessLoss()]
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
RESULTS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"]
USUAL = {name: case for name, case in SIMPLE.items() if not name.endswith("none")}

LOGITS, LABELS = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)

TENSOR = pack(np.float32([1, 2, 3]))
MORE_OF_A_RESULT = [
    b"",
    pb.LossResult(loss=TENSOR).SerializeToString(),
    pb.LossResult(gradients=[pb.Gradient(input="inputs", tensors=[TENSOR])]).SerializeToString(),
    pb.LossResult(kept_rows=TENSOR).SerializeToString(),
    pb.LossResult(negative_side_count=9).SerializeToString(),
    b"\x7b\x7c",  # a group, which nobody knows
    b"\x7b",
    b"\x7c",
]
MORE_OF_AN_ANSWER = [
    b"",
    pb.ComputeLossResponse(results=[pb.LossResult(loss=TENSOR)]).SerializeToString(),
    pb.ComputeLossResponse(timings=pb.StageTimings(queue_us=4)).SerializeToString(),
    b"\x7b\x7c",
    b"\x7b",
]


def usual(loss, arguments, options):
    """A call by its layout, with its request; None where it has no usual one."""
    return requests.usual_call(loss, [arguments], options, [None], shares_memory=False)


def general_call(loss, arguments, options):
    (call,) = requests.loss_batch(loss, [arguments], options, [None], Storage(None)).calls(None)
    return call


@st.composite
def strided(draw, dtype):
    """An array in no order, or a view of one."""
    array = draw(arrays.arrays(np.uint8, SHAPES)).astype(dtype)
    return draw(st.sampled_from([array, array.T, array[..., ::-1] if array.ndim else array]))


@EXAMPLES
@given(st.data())
def test_a_request_is_the_same_to_the_byte(data):
    loss = data.draw(st.sampled_from(LOSSES))
    count = data.draw(st.integers(1, len(loss.inputs)))
    dtypes = st.sampled_from([*DTYPES.values()])
    arguments = [data.draw(strided(data.draw(dtypes))) for _ in range(count)]
    options = EvaluationOptions(
        gradients=data.draw(st.sampled_from([False, True, loss.inputs[0], (loss.inputs[0],), ()])),
        gradient_dtype=data.draw(st.sampled_from([None, "float64", np.float16])),
        component_gradients=data.draw(st.booleans()),
        strict=data.draw(st.booleans()),
    )
    found = usual(loss, arguments, options)
    assert (found is not None) == all(array.size for array in arguments)
    assert found is None or found.request == general_call(loss, arguments, options).outgoing()


@st.composite
def answers(draw, shape):
    """An answer of a server of ours, or nearly one."""
    number = st.floats(width=32)
    loss = np.float32(draw(number))
    outcome = LossOutcome(
        loss=np.asarray(loss),
        components=draw(st.sampled_from([(), [("cls_loss", 0.5, 2.0)]])),
        gradients=draw(
            st.sampled_from([{}, {"inputs": [draw(arrays.arrays(np.float32, shape, elements=number))]}])
        ),
        raw_sums=[{"cls_loss": float(loss), "valid_count": 3.0, "positive_count": draw(st.integers(0, 300))}],
        non_finite=draw(st.sampled_from([(), [NonFinite(input="inputs", count=2, first_index=(0, 1))]])),
        preset=draw(st.sampled_from([None, LossPreset.AUTOTIMM])),
        kept_rows=draw(st.sampled_from([None, np.arange(3)])),
    )
    timings = pb.StageTimings(decode_us=draw(st.integers(0, 300)), compute_us=5)
    rest = pb.ComputeLossResponse(timings=timings).SerializeToString()
    before, after = draw(st.tuples(*[st.sampled_from(MORE_OF_A_RESULT)] * 2))
    result = message_field(RESULTS, [before, *loss_result(outcome), after])
    data = b"".join(placed([*result, rest, draw(st.sampled_from(MORE_OF_AN_ANSWER))]))
    with suppress(DecodeError):
        stock = pb.ComputeLossResponse.FromString(data).SerializeToString()
        data = draw(st.sampled_from([data, stock]))
    return data


def meaning(call, data):
    """What an answer means, so that it can be compared; None where that is nothing."""
    try:
        results = call.result(data)
    except ServerError:
        return None
    return [
        (repr(result), *[(array.dtype, array.shape, array.tobytes()) for array in arrays_of(result)])
        for result in results
    ]


def arrays_of(result):
    return [
        result.loss,
        *result.gradients.values(),
        *([] if result.kept_rows is None else [result.kept_rows]),
    ]


@pytest.mark.parametrize("gradients", [True, False])
def test_an_answer_that_is_cut_short_means_nothing(gradients):
    options = EvaluationOptions(gradients=gradients)
    call, _ = usual(FocalLoss(), (LOGITS, LABELS), options)
    outcome = LossOutcome(np.float32(1), gradients={"inputs": [LOGITS]} if gradients else {})
    answer = b"".join(placed(message_field(RESULTS, loss_result(outcome))))
    assert meaning(call, answer) is not None
    assert all(meaning(call, answer[:length]) is None for length in range(1, len(answer)))


def test_a_tensor_in_place_of_a_result_is_no_answer():
    call, _ = usual(FocalLoss(), (LOGITS, LABELS), EvaluationOptions())
    answer = pb.LossResult(loss=pack(np.float32(7))).SerializeToString()
    assert call.read_usual(answer) is None


@pytest.mark.parametrize("padding", [1, 3, 4, 8])
def test_a_padded_length_is_left_to_protobuf(padding):
    call, _ = usual(FocalLoss(), (LOGITS, LABELS), EvaluationOptions())
    result = pb.LossResult(loss=pack(np.float32(7))).SerializeToString()
    assert call.read_usual(RESULTS + bytes([len(result)]) + result) is not None
    assert call.read_usual(RESULTS + bytes([len(result) | 0x80, *[0x80] * (padding - 1), 0]) + result) is None


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_any_answer_means_the_same_whoever_reads_it(data):
    shape = data.draw(st.sampled_from([(2, 3), (1, 4, 2, 1), (1, 1)]))
    options = EvaluationOptions(gradients=data.draw(st.booleans()))
    arguments = np.zeros(shape, np.float32), np.zeros(shape[:1] + shape[2:], np.int64)
    call, _ = usual(FocalLoss(), arguments, options)
    answer = data.draw(damaged(answers(shape)))
    general = general_call(FocalLoss(), arguments, options)
    assert (
        meaning(call, answer) == meaning(general, answer) == meaning(call._replace(read_usual=None), answer)
    )


@pytest.fixture
def noted(monkeypatch):
    """What became of each answer that was read by its layout."""
    found = []
    read = AnswerLayout.read

    def noting(self, data):
        results = read(self, data)
        found.append(results)
        return results

    monkeypatch.setattr(AnswerLayout, "read", noting)
    requests._layout.cache_clear()  # of calls that know the other one
    yield found
    requests._layout.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", USUAL)
def test_a_servers_answer_is_read_by_its_layout(client, noted, name, gradients, dtype):
    case = USUAL[name]
    first, *others = case.arguments()
    arguments = [first.astype(dtype), *others]
    result = client.compute_loss(case.config, *arguments, gradients=gradients)
    assert noted == [[result]]
    # Asked for in a batch of two, it is read field by field.
    again, _ = client.compute_losses(case.config, [arguments] * 2, gradients=gradients)
    assert len(noted) == 1
    assert same_bits(result.loss, again.loss)
    assert list(result.gradients) == list(again.gradients)
    assert all(same_bits(result.gradients[key], array) for key, array in again.gradients.items())
    for property_name in ("raw_sums", "level_sums", "positive_count", "preset", "components", "non_finite"):
        assert getattr(result, property_name) == getattr(again, property_name)


def test_a_gradient_is_a_view_of_its_answer_wherever_that_begins(client):
    for rows in range(200, 232):
        arrays = np.zeros((rows, 3), np.float32), np.zeros(rows, np.int64)
        result = client.compute_loss(FocalLoss(), *arrays, gradients=True)
        assert isinstance(result.gradients["inputs"].base, bytes)


UNUSUAL = {
    "names in a list": ((LOGITS, LABELS), {"gradients": ["inputs"]}),
    "nothing": ((LOGITS[:0], LABELS[:0]), {"gradients": True}),
    "a list of numbers": ((LOGITS, LABELS.tolist()), {"gradients": True}),
    "another byte order": ((LOGITS.astype(">f4"), LABELS), {"gradients": True}),
    "a narrow wire": ((LOGITS, LABELS), {"gradients": True, "wire_dtype": "float16"}),
    "large": ((np.zeros((4, 1 << 14), np.float32), LABELS), {"gradients": True}),
    "labels that may be narrowed": (
        (np.zeros((2048, 2), np.float32), np.zeros(2048, int)),
        {"gradients": True},
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_has_no_usual_layout_is_evaluated_as_ever(client, name):
    arguments, options = UNUSUAL[name]
    assert usual(FocalLoss(), arguments, EvaluationOptions(**options)) is None
    result = client.compute_loss(FocalLoss(), *arguments, **options)
    rows, classes = np.shape(arguments[0])
    assert float(result.loss) == pytest.approx(float(expected(classes)) if rows else 0, rel=2e-3)
    assert result.gradients["inputs"].shape == np.shape(arguments[0])


@pytest.mark.parametrize("rows", [4, 1 << 15])
def test_names_that_can_be_read_once_are_read_once(client, rows):
    arrays = np.zeros((rows, 3), np.float32), np.zeros(rows, np.int64)
    names = iter(["inputs"])
    assert list(client.compute_loss(FocalLoss(), *arrays, gradients=names).gradients) == ["inputs"]
    assert list(client.compute_loss(FocalLoss(), *arrays, gradients=names).gradients) == []


def test_what_equals_an_option_is_not_taken_for_it(client):
    assert client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients
    for odd in (1, np.True_):
        with pytest.raises(TypeError, match="not iterable"):
            client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=odd)
    for name in ("strict", "component_gradients"):
        client.compute_loss(FocalLoss(), LOGITS, LABELS, **{name: True})
        with pytest.raises(TypeError):
            client.compute_loss(FocalLoss(), LOGITS, LABELS, **{name: 1.0})


def test_a_type_keeps_what_its_maker_wrote_on_it_to_itself(client):
    marked = LOGITS.astype(np.dtype(np.float32, metadata={"by": "somebody"}))
    for logits in (marked, LOGITS):
        result = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True)
        assert result.gradients["inputs"].dtype.metadata is None


class Doubled(FocalLoss):
    """A loss that packs an item in its own way."""

    def item(self, arguments, path, storage):
        return super().item((arguments[0] * 2, arguments[1]), path, storage)


def test_a_loss_that_packs_its_items_does(client):
    twice = client.compute_loss(FocalLoss(), LOGITS + 2, LABELS)
    assert same_bits(client.compute_loss(Doubled(), LOGITS + 1, LABELS).loss, twice.loss)


def test_an_answer_with_a_stray_bool_is_an_error():
    options = EvaluationOptions(gradients=True, gradient_dtype=bool)
    call, _ = usual(FocalLoss(), (LOGITS, LABELS), options)
    gradient = pack(np.zeros((4, 3), np.bool_))
    for byte, is_well in ((1, True), (7, False)):
        gradient.inline = bytes([byte] * 12)
        result = pb.LossResult(loss=pack(np.float32(7)))
        result.gradients.add(input="inputs", tensors=[gradient])
        answer = pb.ComputeLossResponse(results=[result]).SerializeToString()
        assert (meaning(call, answer) is not None) == is_well


def expected(classes):
    """The focal loss of a row of zeros: its own class weighs 1/4, the others 3/4."""
    return np.log(2) * 0.25 * (0.25 + 0.75 * (classes - 1))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (LOGITS,),
        (LOGITS, None),
        (LOGITS, LABELS, LABELS),
        (LOGITS.astype(object), LABELS),
        (LOGITS[None], LABELS),
    ],
    ids=["none", "one", "None", "three", "objects", "a wrong shape"],
)
def test_bad_arguments_are_refused_as_ever(client, arguments):
    caught = []
    for find in (requests.usual_call, lambda *_, **__: None):
        with (
            patch.object(client_module, "usual_call", find),
            pytest.raises((InvalidInputError, TypeError)) as error,
        ):
            client.compute_loss(FocalLoss(), *arguments, gradients=True)
        caught.append(error.value)
    assert type(caught[0]) is type(caught[1])
    assert str(caught[0]) == str(caught[1])


def through_a_pickle(protocol, result):
    return pickle.loads(pickle.dumps(result, protocol))  # noqa: S301  # its own


PICKLES = [partial(through_a_pickle, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, *PICKLES])
def test_a_copy_of_a_result_says_the_same(client, noted, again):
    by_layout = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    general, _ = client.compute_losses(FocalLoss(), [(LOGITS, LABELS)] * 2, gradients=True)
    assert noted == [[by_layout]]
    for result in (by_layout, general):
        assert repr(again(result)) == repr(result)


def test_torch_tensors_have_the_same_layout():
    options = EvaluationOptions(gradients=True)
    tensors = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, dtype=int)
    assert usual(FocalLoss(), tensors, options) == usual(FocalLoss(), (LOGITS, LABELS), options)


def test_a_released_result_keeps_nothing_of_its_answer(target):
    logits, labels = np.zeros((16, 80), np.float32), np.zeros(16, np.int64)
    with Client(target) as client:
        client.compute_loss(FocalLoss(), logits, labels, gradients=True)
        tracemalloc.start()
        try:
            kept = []
            for _ in range(200):
                kept.append(client.compute_loss(FocalLoss(), logits, labels, gradients=True))
                kept[-1].release()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 100 * logits.nbytes
    assert len(pickle.dumps(kept[0])) < 1000
    assert kept[0].raw_sums["valid_count"] == 16


@pytest.fixture(scope="module")
def local_target(tmp_path_factory):
    """A server that shares memory."""
    with make_server(listen=(f"unix:{tmp_path_factory.mktemp('sockets')}/lossd.sock",)) as running:
        yield running.addresses[0]


def test_small_calls_through_a_unix_socket_have_the_layout_too(local_target, noted):
    with Client(local_target) as client:
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert noted == [[result]]


@pytest.mark.parametrize("settings_of_call", [{}, {"gradient_dtype": "float64"}, {"strict": True}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("name", USUAL)
def test_a_gradient_in_shared_memory_is_the_one_that_is_sent(
    client, local_target, noted, name, dtype, settings_of_call
):
    case = USUAL[name]
    first, *others = case.arguments(n=LEAST_BYTES // 2)
    arguments = [first.astype(dtype), *others]
    expected = client.compute_loss(case.config, *arguments, gradients=True, **settings_of_call)
    noted.clear()
    with Client(local_target) as sharing:
        found = sharing.compute_loss(case.config, *arguments, gradients=True, **settings_of_call)
        (gradient,) = found.gradients.values()
        assert not gradient.flags.writeable
        assert not isinstance(gradient.base, bytes)
        # Nobody guesses the type of the loss where the gradient's is not its prediction's.
        is_guessed = settings_of_call.get("gradient_dtype") != "float64" or dtype is np.float64
        assert noted == [[found] if is_guessed else None]
        assert same_bits(found.loss, expected.loss)
        assert same_bits(gradient, *expected.gradients.values())
        assert found.raw_sums == expected.raw_sums


def test_an_answer_that_names_other_memory_is_refused():
    shared, elsewhere = [
        shared_result_layout(np.dtype("f4"), "inputs", np.dtype("f4"), (4, 3), b"r" * 16, offset)
        for offset in (0, 64)
    ]
    read = AnswerLayout("inputs", shared, np.zeros((4, 3), np.float32)).read
    answers = [b"".join(layout.pieces(b"", np.float32(1))) for layout in (shared, elsewhere)]
    assert [read(answer) is None for answer in answers] == [False, True]
    call, _ = usual(FocalLoss(), (LOGITS, LABELS), EvaluationOptions(gradients=True))
    with pytest.raises(ServerError, match="memory that it was not given"):
        call.result(answers[1])
