"""The assigner gives bit for bit what its definition gives."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lossd_server.targets import FCOSAssigner
from tests.domain import oracle_targets

pytestmark = pytest.mark.usefixtures("painter")


SHARED = Path(os.environ.get("LOSSD_SHARED", Path(__file__).parents[2].parent / "shared"))
COCO = SHARED / "data" / "coco_val2014_100_boxes.json"

BOX_TYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint32")
AROUND = [0.0, 1e-5, -1e-5, 0.5, -0.5, 1.0, -1.0, 4.0, 12.0]
ENDS = [-math.inf, -1.0, 0.0, 4.0, 8.0, 32.0, 63.99999, 64.0, 64.0000001, 96.0, 128.0, 512.0, math.inf]

coordinates = st.one_of(
    st.builds(lambda n, step: float(n * step), st.integers(-4, 16), st.sampled_from([4, 8, 16, 64])),
    st.builds(lambda n, off: n * 64.0 + off, st.integers(-1, 12), st.sampled_from(AROUND)),
    st.floats(-50, 700, width=32),
    st.sampled_from([63.99999, 64.00001, 1e-30, -1e-30, 1e15, -1e15, 5000.0, -5000.0]),
)


@st.composite
def images(draw, types=BOX_TYPES, most=6):
    """Boxes, labels and crowd flags of one image, with repeats and boxes of equal area."""
    dtype = np.dtype(draw(st.sampled_from(types)))
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    raw = draw(st.lists(st.tuples(*[coordinates] * 4), max_size=most))
    values = np.array(raw, np.float64).reshape(-1, 4)
    # Half of the largest integer: int64's own largest is no float64.
    values = values.clip(float(limits.min), float(limits.max) / (1 if dtype.kind == "f" else 2)).astype(dtype)
    boxes = np.concatenate([np.sort(values[:, ::2]), np.sort(values[:, 1::2])], axis=1)[:, [0, 2, 1, 3]]
    if len(boxes):
        picks = draw(st.lists(st.integers(0, len(boxes) - 1), max_size=2))
        turned = boxes[:, [1, 0, 3, 2]]
        boxes = np.concatenate([boxes, boxes[picks], turned[picks]])
    labels = np.arange(len(boxes))[::-1].copy()
    crowd = draw(
        st.lists(st.sampled_from([False, False, False, True]), min_size=len(boxes), max_size=len(boxes))
    )
    return boxes, labels, np.array(crowd, np.bool_)


@st.composite
def pyramids(draw):
    """Strides, ranges and level sizes, in any combination."""
    count = draw(st.integers(1, 7))

    def several(entry):
        return tuple(draw(st.lists(entry, min_size=count, max_size=count)))

    strides = several(st.sampled_from([1, 2, 3, 7, 8, 16, 32, 64, 100, 128]))
    ranges = several(
        st.lists(st.sampled_from(ENDS), min_size=2, max_size=2, unique=True).map(sorted).map(tuple)
    )
    sizes = several(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return strides, ranges, sizes


def product(batch, strides, ranges, sizes):
    """Returns the product's answer for a batch as the oracle's levels, image by image."""
    truth = [{"boxes": boxes, "labels": labels, "iscrowd": crowd} for boxes, labels, crowd in batch]
    assignment = FCOSAssigner(strides=strides, regress_ranges=ranges).assign(truth, sizes)
    sparse = assignment.sparse()
    answers = [[] for _ in batch]
    for number, level in enumerate(assignment.dense()):
        matched = np.full(level.cls.shape, -1, np.int64)
        here = sparse.locations[:, 1] == number
        image, _, row, column = sparse.locations[here].T
        matched[image, row, column] = sparse.matched[here]
        ignored = np.zeros(level.cls.shape, np.bool_) if level.ignored is None else level.ignored
        for index, answer in enumerate(answers):
            parts = (level.cls, matched, level.reg, level.centerness, ignored)
            answer.append(oracle_targets.Level(*(part[index] for part in parts)))
    return answers


def assert_same_bits(actual, expected):
    for number, (have, want) in enumerate(zip(actual, expected, strict=True)):
        for name, one, other in zip(oracle_targets.Level._fields, have, want, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{name} of level {number}", strict=True)
            assert one.tobytes() == other.tobytes(), f"signs or NaNs of {name} of level {number}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images(), pyramids())
def test_assignment_is_the_naive_triple_loop(image, levels):
    (answer,) = product([image], *levels)
    assert_same_bits(answer, oracle_targets.by_loops(*image, *levels))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images(), pyramids())
def test_the_two_oracles_agree(image, levels):
    assert_same_bits(oracle_targets.all_pairs(*image, *levels), oracle_targets.by_loops(*image, *levels))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images(most=20), pyramids())
def test_assignment_is_all_pairs(image, levels):
    (answer,) = product([image], *levels)
    assert_same_bits(answer, oracle_targets.all_pairs(*image, *levels))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(BOX_TYPES).flatmap(lambda kind: st.lists(images([kind]), max_size=4)), pyramids())
def test_a_batch_is_its_images_one_by_one(batch, levels):
    answers = product(batch, *levels)
    assert len(answers) == len(batch)
    for image, answer in zip(batch, answers, strict=True):
        assert_same_bits(answer, product([image], *levels)[0])


def test_an_image_is_assigned_alike_whatever_type_its_neighbour_has():
    # From x = 64 the left side is 64 away in float32 and 63.9999999999 in float64.
    box = np.array([[1e-10, 10, 100, 118]], np.float32)
    image = (box, np.array([0]), np.array([False]))
    no_objects = (np.zeros((0, 4), np.float64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    levels = ((128,), ((0.0, 64.0),), ((1, 1),))
    assert_same_bits(product([image, no_objects], *levels)[0], product([image], *levels)[0])


BIG = np.float32(3e38)


@pytest.mark.parametrize("side", [2e19, 1e30, BIG])
def test_boxes_whose_area_overflows_float32_are_ordinary(side):
    boxes = np.array([[-side, -side, side, side], [0, 0, side, side], [0, 0, 40, 40]], np.float32)
    image = (boxes, np.arange(3), np.zeros(3, np.bool_))
    levels = ((8, 8), ((-1.0, 64.0), (64.0, math.inf)), ((8, 8), (8, 8)))
    (answer,) = product([image], *levels)
    assert_same_bits(answer, oracle_targets.by_loops(*image, *levels))


def test_a_range_may_end_beyond_float32():
    image = (np.array([[0, 0, 40, 40]], np.float32), np.array([0]), np.array([False]))
    sizes = ((5, 5),)
    (answer,) = product([image], (8,), ((-1.0, 1e300),), sizes)
    assert_same_bits(answer, product([image], (8,), ((-1.0, math.inf),), sizes)[0])


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
    st.lists(st.integers(1, 300), min_size=1, max_size=7),
)
@example((800, 1333), [8, 16, 32, 64, 128])
@example((0, 1), [8])
def test_level_sizes_are_rounded_up(image_size, strides):
    sizes = FCOSAssigner(strides=tuple(strides), regress_ranges=((0, 1),) * len(strides)).feature_sizes(
        image_size
    )
    assert sizes == [tuple(math.ceil(extent / stride) for extent in image_size) for stride in strides]


def coco_images():
    """Yields image size, boxes, labels and crowd flags, scaled to 800 the short side and 1333 at most."""
    data = json.loads(COCO.read_text())
    classes = {category["id"]: index for index, category in enumerate(data["categories"])}
    for image in data["images"]:
        extents = image["height"], image["width"]
        scale = min(800 / min(extents), 1333 / max(extents))
        objects = [entry for entry in data["annotations"] if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        yield (
            tuple(round(extent * scale) for extent in extents),
            boxes * scale,
            np.array([classes[entry["category_id"]] for entry in objects], np.int64),
            np.array([entry["iscrowd"] for entry in objects], np.bool_),
        )


@pytest.mark.skipif(not COCO.exists(), reason=f"no {COCO}; set LOSSD_SHARED to the folder that holds data/")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_real_images_are_assigned_as_defined(dtype):
    assigner = FCOSAssigner()
    seen = positives = ignored = 0
    for image_size, boxes, labels, crowd in coco_images():
        sizes = assigner.feature_sizes(image_size)
        image = (boxes.astype(dtype), labels, crowd)
        (answer,) = product([image], assigner.strides, assigner.ranges, sizes)
        assert_same_bits(answer, oracle_targets.all_pairs(*image, assigner.strides, assigner.ranges, sizes))
        seen += 1
        positives += sum(int((level.labels >= 0).sum()) for level in answer)
        ignored += sum(int(level.ignored.sum()) for level in answer)
    assert seen == 100
    assert positives > 10_000
    assert ignored > 0
