"""Sparse targets of a few locations lie where they always do, and mean the same whoever reads them."""

from contextlib import suppress

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd import target_answers
from lossd.tensors import pack, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.writing import message_field, placed, tags_of
from lossd_client import FCOSAssigner, ServerError
from lossd_client import _target_requests as requests
from lossd_server.rpc.encode import target_result
from lossd_server.targets import AssignerPreset
from lossd_server.targets import FCOSAssigner as LocalAssigner
from tests.client.damage import damaged
from tests.client.support import same_bits

RESULTS = tags_of(pb.AssignTargetsResponse.DESCRIPTOR)["results"]
SPARSE = tags_of(pb.TargetResult.DESCRIPTOR)["sparse"]
TENSORS = ("locations", "labels", "ltrb", "centerness", "matched", "ignored")
SIZE = (64, 96)

TENSOR = pack(np.float32([1, 2]))
MORE_OF_A_RESULT = [
    b"",
    pb.TargetResult(sparse=pb.SparseTargets(labels=TENSOR)).SerializeToString(),
    pb.TargetResult(dense=pb.DenseTargets(levels=[pb.DenseLevel(cls=TENSOR)])).SerializeToString(),
    pb.TargetResult(positive_counts=[7]).SerializeToString(),
    b"\x7b\x7c",  # a group, which nobody knows
    b"\x7b",
    b"\x7c",
]
MORE_OF_AN_ANSWER = [
    b"",
    pb.AssignTargetsResponse(results=[pb.TargetResult()]).SerializeToString(),
    pb.AssignTargetsResponse(timings=pb.StageTimings(queue_us=4)).SerializeToString(),
    b"\x7b\x7c",
    b"\x7b",
]


def assignment(boxes, crowd=()):
    """What the module assigns to boxes of one image, of which the last may be crowd regions."""
    image = {
        "boxes": np.float32([*boxes, *crowd]).reshape(-1, 4),
        "labels": np.arange(len(boxes) + len(crowd)),
    }
    if crowd:
        image["iscrowd"] = np.arange(len(image["labels"])) >= len(boxes)
    assigner = LocalAssigner()
    return assigner.assign([image], assigner.feature_sizes(SIZE))


def result_of(found, *, target_format=pb.TARGET_FORMAT_SPARSE, narrow=True):
    return target_result(found, target_format=target_format, preset=AssignerPreset.AUTOTIMM, narrow=narrow)


def answer_of(found, rest=b"", **settings):
    return b"".join(placed([*message_field(RESULTS, result_of(found, **settings)), rest]))


def call(*, sparse=True):
    truth = [{"boxes": np.zeros((1, 4), np.float32), "labels": np.zeros(1, np.int64)}]
    return requests.assign_call(FCOSAssigner(), truth, image_size=SIZE, feature_sizes=None, sparse=sparse)


def meaning(read, data):
    """What an answer means, so that it can be compared; None where that is nothing."""
    try:
        targets = read.result(data)
    except ServerError:
        return None
    if not hasattr(targets, "locations"):
        return repr(targets)
    arrays = [getattr(targets, name) for name in TENSORS]
    about = targets.positive_counts, targets.feature_sizes, targets.preset, targets.timings
    return about, [(array.dtype, array.shape, array.tobytes(), array.flags.writeable) for array in arrays]


@st.composite
def scenes(draw):
    """A few boxes in an image of that size; none at all as well."""
    corner = st.integers(0, 60)
    some = st.tuples(corner, corner, st.integers(1, 60), st.integers(1, 60))
    return [(x, y, x + width, y + height) for x, y, width, height in draw(st.lists(some, max_size=4))]


@st.composite
def answers(draw):
    """An answer of a server of ours, or nearly one."""
    found = assignment(draw(scenes()), draw(st.sampled_from([(), [(0, 0, 40, 40)]])))
    timings = pb.StageTimings(decode_us=draw(st.integers(0, 300)), compute_us=5)
    rest = pb.AssignTargetsResponse(timings=timings).SerializeToString()
    before, after = draw(st.tuples(*[st.sampled_from(MORE_OF_A_RESULT)] * 2))
    result = message_field(RESULTS, [before, *result_of(found), after])
    data = b"".join(placed([*result, rest, draw(st.sampled_from(MORE_OF_AN_ANSWER))]))
    with suppress(DecodeError):
        stock = pb.AssignTargetsResponse.FromString(data).SerializeToString()
        data = draw(st.sampled_from([data, stock]))
    return data


@settings(max_examples=1000, deadline=None)
@given(damaged(answers()))
def test_any_answer_means_the_same_whoever_reads_it(data):
    usual = call()
    assert meaning(usual, data) == meaning(usual._replace(read_usual=None), data)


@settings(max_examples=100, deadline=None)
@given(scenes(), st.booleans())
def test_stock_protobuf_reads_what_the_assigner_found(boxes, narrow):
    found = assignment(boxes)
    (result,) = pb.AssignTargetsResponse.FromString(answer_of(found, narrow=narrow)).results
    for name, array in zip(TENSORS, found.sparse(), strict=True):
        assert same_bits(unpack(getattr(result.sparse, name)), array)
    assert [*result.positive_counts] == found.positive_counts()


@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 500, 1023])
def test_a_size_says_how_many_locations_there_are(count):
    layout = target_answers.targets_layout(count)
    assert target_answers._layout_of_size(layout.size) is layout
    assert target_answers._layout_of_size(layout.size + 1) is None


def test_an_answer_that_is_cut_short_has_no_layout():
    data = answer_of(
        assignment([(0, 0, 40, 40)]),
        pb.AssignTargetsResponse(timings=pb.StageTimings(queue_us=300)).SerializeToString(),
    )
    whole = call().read_usual(data)
    assert whole is not None
    end = data.index(SPARSE) + len(b"".join(result_of(assignment([(0, 0, 40, 40)]))))
    assert all(call().read_usual(data[:length]) is None for length in range(end))


@pytest.mark.parametrize("count", [0, 2])
def test_an_answer_has_one_result(count):
    with pytest.raises(ServerError, match=f"{count} results, want 1"):
        call().result(pb.AssignTargetsResponse(results=[pb.TargetResult()] * count).SerializeToString())


@pytest.mark.parametrize("padding", [1, 3, 4, 8])
def test_a_padded_length_is_left_to_protobuf(padding):
    result = b"".join(result_of(assignment([])))
    assert len(result) < 0x80
    assert call().read_usual(RESULTS + bytes([len(result)]) + result) is not None
    padded = bytes([len(result) | 0x80, *[0x80] * (padding - 1), 0])
    assert call().read_usual(RESULTS + padded + result) is None


UNUSUAL = {
    "with a crowd region": {"found": assignment([(0, 0, 40, 40)], [(0, 0, 90, 60)])},
    "dense": {"found": assignment([(0, 0, 40, 40)]), "target_format": pb.TARGET_FORMAT_DENSE},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_targets_are_read_field_by_field(name):
    data = answer_of(**UNUSUAL[name])
    assert call().read_usual(data) is None
    assert meaning(call(), data) is not None


def test_elements_of_four_bytes_lie_in_the_answer(client):
    boxes = np.float32([[3, 5, 60, 40], [20, 10, 90, 60]])
    found = client.assign_targets(
        FCOSAssigner(), [{"boxes": boxes, "labels": np.arange(2)}], image_size=SIZE, sparse=True
    )
    views = [found.locations, found.ltrb, found.centerness, found.matched]
    assert len(found.labels)
    assert len({id(array.base) for array in views}) == 1
    assert isinstance(views[0].base, bytes)


@pytest.mark.parametrize("count", [3, 40])
def test_dense_targets_are_made_of_them_too(client, count):
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 400, (count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(10, 100, (count, 2)).astype(np.float32)], 1)
    truth = [{"boxes": boxes, "labels": np.arange(count)}]
    dense = client.assign_targets(FCOSAssigner(), truth, image_size=(512, 512))
    assigner = LocalAssigner()
    expected = assigner.assign(truth, assigner.feature_sizes((512, 512))).dense()
    for level, wanted in zip(dense.levels, expected, strict=True):
        assert same_bits(level.cls, wanted.cls)
        assert same_bits(level.reg, wanted.reg)
        assert same_bits(level.centerness, wanted.centerness)
