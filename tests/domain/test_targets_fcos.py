"""What an assignment looks like, and the figures that people check an assigner with."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd_server.targets import BoxFormat, FCOSAssigner, GroundTruth

pytestmark = pytest.mark.usefixtures("painter")


SIZES = [(19, 25), (10, 13), (5, 7), (3, 4), (2, 2)]  # of 150 x 200 pixels


def truth(*boxes, dtype=np.float32, **more):
    """Objects of one image, labelled 0, 1, 2 …"""
    return {"boxes": np.array(boxes, dtype).reshape(-1, 4), "labels": np.arange(len(boxes)), **more}


def assign(*images, sizes=SIZES, num_classes=None, **settings_of_assigner):
    return FCOSAssigner(**settings_of_assigner).assign(images, sizes, num_classes=num_classes)


def assert_same(one, other):
    """Both assignments hand out the same bits in both forms."""
    pairs = list(zip(one.sparse(), other.sparse(), strict=True))
    for have, want in zip(one.dense(), other.dense(), strict=True):
        pairs += [(have.cls, want.cls), (have.reg, want.reg), (have.centerness, want.centerness)]
    for have, want in pairs:
        np.testing.assert_array_equal(have, want, strict=True)


def test_the_default_levels_are_p3_to_p7():
    assigner = FCOSAssigner()
    assert assigner.strides == (8, 16, 32, 64, 128)
    assert assigner.ranges == ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))
    assert assigner.feature_sizes((150, 200)) == SIZES


def test_a_150_pixel_box_takes_49_locations_on_p4_and_16_on_p5():
    assert assign(truth([0, 0, 150, 150])).positive_counts() == [0, 49, 16, 0, 0]


def test_a_6_pixel_box_between_the_locations_takes_none():
    assert assign(truth([13, 13, 19, 19])).positive_counts() == [0, 0, 0, 0, 0]


def test_a_6_pixel_box_around_a_location_takes_it():
    assert assign(truth([9, 9, 15, 15])).sparse().locations.tolist() == [[0, 0, 1, 1]]


def test_a_farthest_side_of_64_is_p4s_alone():
    two_levels = {"strides": (8, 8), "regress_ranges": ((-1, 64), (64, 128)), "sizes": [(1, 1), (1, 1)]}
    assert assign(truth([0, 0, 68, 8]), **two_levels).positive_counts() == [0, 1]
    assert assign(truth([0, 0, np.nextafter(np.float32(68), 0), 8]), **two_levels).positive_counts() == [1, 0]


def test_a_farthest_side_of_64_on_the_default_levels():
    p3, p4, *_ = assign(truth([-4, 0, 120, 100])).dense()
    assert p3.cls[0, 6, 7] == -1  # (60, 52): left side 64
    assert p4.cls[0, 3, 3] == 0  # (56, 56): right side 64


def test_a_location_on_the_edge_of_a_box_is_outside():
    one_cell = {"strides": (8,), "regress_ranges": ((-1, math.inf),), "sizes": [(1, 1)]}
    for edge in ([4, 0, 8, 8], [0, 4, 8, 8], [0, 0, 4, 8], [0, 0, 8, 4]):
        assert assign(truth(edge), **one_cell).positive_counts() == [0]


def test_the_smallest_box_wins_and_then_the_first():
    one_cell = {"strides": (8,), "regress_ranges": ((-1, 64),), "sizes": [(1, 1)]}
    assert assign(truth([0, 0, 9, 9], [0, 0, 8, 8]), **one_cell).sparse().matched.tolist() == [1]
    assert assign(truth([0, 0, 8, 16], [0, 0, 16, 8]), **one_cell).sparse().matched.tolist() == [0]


def test_centerness_is_1_in_the_middle_and_the_formula_elsewhere():
    one_cell = {"strides": (8,), "regress_ranges": ((-1, 64),), "sizes": [(1, 1)]}
    assert assign(truth([0, 0, 8, 8]), **one_cell).sparse().centerness.tolist() == [1]
    sparse = assign(truth([0, 2, 8, 20]), **one_cell).sparse()
    assert sparse.ltrb.tolist() == [[4, 2, 4, 16]]
    assert sparse.centerness[0] == np.sqrt(np.float32(2 / 16))


def test_centerness_of_a_box_thinner_than_1e_7_pixels_divides_by_1e_7():
    one_cell = {"strides": (8,), "regress_ranges": ((-1, 64),), "sizes": [(1, 1)]}
    box = truth([4 - 2e-8, 4 - 2e-8, 4 + 4e-8, 4 + 4e-8], dtype=np.float64)
    assert assign(box, **one_cell).sparse().centerness[0] == pytest.approx(0.2, rel=1e-6)


def test_areas_that_are_equal_in_the_boxes_own_type_are_a_tie():
    boxes = [0, 0, 4097, 4097], [0, 0, 4096, 4098]  # 16785409 and 16785408 square pixels
    one_cell = {"strides": (8,), "regress_ranges": ((-1, math.inf),), "sizes": [(1, 1)]}
    assert assign(truth(*boxes), **one_cell).sparse().matched.tolist() == [0]
    assert assign(truth(*boxes, dtype=np.float64), **one_cell).sparse().matched.tolist() == [1]


def test_dense_targets_have_the_documented_types_and_shapes():
    levels = assign(truth([0, 0, 150, 150]), truth()).dense()
    for level, (height, width) in zip(levels, SIZES, strict=True):
        assert (level.cls.dtype, level.cls.shape) == (np.int64, (2, height, width))
        assert (level.reg.dtype, level.reg.shape) == (np.float32, (2, 4, height, width))
        assert (level.centerness.dtype, level.centerness.shape) == (np.float32, (2, height, width))
        assert level.ignored is None


def test_sparse_targets_have_the_documented_types_and_shapes():
    sparse = assign(truth([0, 0, 150, 150])).sparse()
    count = 65
    assert (sparse.locations.dtype, sparse.locations.shape) == (np.int32, (count, 4))
    assert (sparse.labels.dtype, sparse.labels.shape) == (np.int64, (count,))
    assert (sparse.ltrb.dtype, sparse.ltrb.shape) == (np.float32, (count, 4))
    assert (sparse.centerness.dtype, sparse.centerness.shape) == (np.float32, (count,))
    assert (sparse.matched.dtype, sparse.matched.shape) == (np.int32, (count,))
    assert (sparse.ignored.dtype, sparse.ignored.shape) == (np.int32, (0, 4))


corners = st.tuples(*[st.integers(-20, 220)] * 4)
random_images = st.lists(
    st.lists(
        corners.map(lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]),
        max_size=6,
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(random_images, st.booleans())
def test_dense_and_sparse_targets_agree(batch, crowded):
    images = [truth(*boxes, iscrowd=np.arange(len(boxes)) % 3 == (0 if crowded else 9)) for boxes in batch]
    assignment = assign(*images)
    sparse = assignment.sparse()
    order = list(map(tuple, sparse.locations.tolist()))
    assert order == sorted(set(order)), "ordered by image, level, row, column, each once"
    assert [tuple(cell) for cell in sparse.ignored.tolist()] == sorted(map(tuple, sparse.ignored.tolist()))
    for number, level in enumerate(assignment.dense()):
        here = sparse.locations[:, 1] == number
        image, _, row, column = sparse.locations[here].T
        assert assignment.positive_counts()[number] == here.sum() == (level.cls >= 0).sum()
        np.testing.assert_array_equal(level.cls[image, row, column], sparse.labels[here])
        np.testing.assert_array_equal(level.reg[image, :, row, column], sparse.ltrb[here])
        np.testing.assert_array_equal(level.centerness[image, row, column], sparse.centerness[here])
        assert not level.reg.transpose(0, 2, 3, 1)[level.cls < 0].any()
        assert not level.centerness[level.cls < 0].any()
        if level.ignored is not None:
            cells = np.argwhere(level.ignored)
            listed = sparse.ignored[sparse.ignored[:, 1] == number]
            np.testing.assert_array_equal(cells, listed[:, [0, 2, 3]])


def test_the_class_is_the_label_of_the_matched_box():
    image = {
        "boxes": np.array([[0, 0, 150, 150], [20, 20, 60, 60]], np.float32),
        "labels": np.array([7, 3], np.uint8),
    }
    sparse = assign(image, num_classes=8).sparse()
    np.testing.assert_array_equal(sparse.labels, np.array([7, 3])[sparse.matched])
    assert set(sparse.labels.tolist()) == {3, 7}


def test_a_crowd_region_is_ignored_at_every_level_and_positive_at_none():
    crowd_alone = assign(truth([0, 0, 150, 150], iscrowd=np.array([True])))
    assert sum(crowd_alone.positive_counts()) == 0
    assert [int(level.ignored.sum()) for level in crowd_alone.dense()] == [19 * 19, 81, 25, 4, 1]


def test_a_box_in_a_crowd_region_keeps_its_locations():
    box, crowd = [20, 20, 60, 60], [0, 0, 150, 150]
    together = assign(truth(box, crowd, iscrowd=np.array([0, 1], np.uint8)))
    alone = assign(truth(box))
    for level, without in zip(together.dense(), alone.dense(), strict=True):
        np.testing.assert_array_equal(level.cls, without.cls)
        assert not (level.ignored & (level.cls >= 0)).any()
    assert together.dense()[0].ignored[0, 0, 0]


def test_flags_that_name_no_crowd_change_nothing():
    assignment = assign(truth([0, 0, 150, 150], iscrowd=np.array([False])))
    assert_same(assignment, assign(truth([0, 0, 150, 150])))
    assert assignment.dense()[0].ignored is None


@settings(max_examples=40, deadline=None)
@given(random_images)
def test_box_formats_say_the_same(batch):
    images = [truth(*boxes) for boxes in batch]

    def assign_as(box_format, convert):
        converted = [{**image, "boxes": convert(image["boxes"].T).T} for image in images]
        return assign(*converted, box_format=box_format)

    expected = assign(*images)
    assert_same(
        expected, assign_as(BoxFormat.XYWH, lambda b: np.stack([b[0], b[1], b[2] - b[0], b[3] - b[1]]))
    )
    centre = assign_as(
        BoxFormat.CXCYWH,
        lambda b: np.stack([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]]),
    )
    assert_same(expected, centre)


def test_no_image_gives_no_targets():
    assignment = assign()
    assert assignment.positive_counts() == [0] * 5
    assert [level.reg.shape for level in assignment.dense()] == [(0, 4, *size) for size in SIZES]
    assert assignment.sparse().locations.shape == (0, 4)


@pytest.mark.parametrize(
    "boxes", [np.zeros(0), np.zeros((0, 4)), np.zeros((0, 4), np.int64), torch.zeros(0, 4)]
)
def test_an_image_without_boxes_is_background(boxes):
    assignment = assign({"boxes": boxes, "labels": np.zeros(0, np.int64)}, truth([0, 0, 150, 150]))
    assert sum(assignment.positive_counts()) == 65
    assert all((level.cls[0] == -1).all() for level in assignment.dense())


def test_a_level_without_locations_takes_nothing():
    assignment = assign(truth([0, 0, 150, 150]), sizes=[(0, 0), (10, 13), (0, 7), (3, 0), (2, 2)])
    assert assignment.positive_counts() == [0, 49, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int16", "uint8"])
def test_torch_tensors_are_taken_as_arrays_are(dtype):
    image = truth([0, 0, 150, 150], [20, 20, 60, 60], dtype=dtype, iscrowd=np.array([False, True]))
    tensors = {name: torch.from_numpy(array) for name, array in image.items()}
    assert_same(assign(tensors), assign(image))
    assert_same(assign(GroundTruth(**tensors)), assign(image))


def test_bfloat16_boxes_are_taken():
    boxes = torch.tensor([[0, 0, 150, 150]], dtype=torch.bfloat16)
    assert_same(assign({"boxes": boxes, "labels": torch.tensor([0])}), assign(truth([0, 0, 150, 150])))


def test_tensors_that_want_gradients_and_strided_arrays_are_taken():
    boxes = torch.tensor([[0.0, 0, 150, 150]], requires_grad=True)
    expected = assign(truth([0, 0, 150, 150]))
    assert_same(assign({"boxes": boxes, "labels": torch.tensor([0])}), expected)
    strided = np.array([[0, 0, 150, 150], [9, 9, 9, 9]], ">f4")[::2]
    assert_same(assign({"boxes": strided, "labels": np.array([0], ">i2")}), expected)


def test_the_callers_arrays_are_left_alone():
    image = truth([0, 0, 150, 150], [20, 20, 60, 60])
    for array in image.values():
        array.setflags(write=False)
    for box_format in BoxFormat:
        assign(image, box_format=box_format)


@pytest.mark.parametrize("side", [300, 1000])
def test_half_precision_boxes_of_more_than_65504_square_pixels_take_locations(side):
    levels = {"sizes": FCOSAssigner().feature_sizes((800, 1024))}
    half = assign(truth([0, 0, side, side], dtype=np.float16), **levels)
    assert sum(half.positive_counts()) > 0
    assert_same(half, assign(truth([0, 0, side, side]), **levels))


def test_a_label_as_large_as_its_type_holds_stays_itself():
    for dtype in (np.uint8, np.uint32, np.int64):
        largest = np.iinfo(dtype).max
        image = {"boxes": np.array([[0, 0, 50, 50]], np.float32), "labels": np.array([largest], dtype)}
        assert set(assign(image).sparse().labels.tolist()) == {largest}


@pytest.mark.parametrize(
    "settings_of_assigner",
    [{}, {"strides": (8,), "regress_ranges": ((-1, math.inf),)}],
    ids=["default levels", "one level without a range"],
)
def test_ten_thousand_boxes_need_less_than_100_mib(settings_of_assigner):
    rng = np.random.default_rng(0)
    at = rng.uniform(-100, [1333, 800], (10_000, 2))
    extent = rng.uniform(2, 400, (10_000, 2))
    image = {"boxes": np.hstack([at, at + extent]).astype(np.float32), "labels": np.zeros(10_000, np.int64)}
    assigner = FCOSAssigner(**settings_of_assigner)
    tracemalloc.start()
    try:
        assignment = assigner.assign([image], assigner.feature_sizes((800, 1333)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(assignment.positive_counts()) > 1000
    assert peak < 100 * 2**20
