"""Bad ground truth and settings are refused by name: the reason, the field and the value."""

import math

import numpy as np
import pytest
import torch

from lossd_server.errors import InvalidInputError, Reason
from lossd_server.targets import BoxFormat, FCOSAssigner

SIZES = [(2, 2)]
BOX = [10.0, 20.0, 30.0, 40.0]


def one_level(**settings):
    return FCOSAssigner(**{"strides": (8,), "regress_ranges": ((-1, 64),), **settings})


def objects(**changes):
    return {"boxes": np.array([BOX, BOX], np.float32), "labels": np.array([0, 1]), **changes}


def refusal(call):
    """Returns the error that `call` is refused with; its message tells the field."""
    with pytest.raises(InvalidInputError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(caught.value.field)
    return caught.value


def refused_image(image, *, num_classes=None, box_format=BoxFormat.XYXY):
    """Returns the refusal of an image that comes second in its batch."""
    assigner = one_level(box_format=box_format)
    return refusal(lambda: assigner.assign([objects(), image], SIZES, num_classes=num_classes))


@pytest.mark.parametrize(
    ("labels", "reason", "values"),
    [
        (np.array([0.0, 1.0]), Reason.INVALID_DTYPE, {"value": "float64"}),
        (np.array([True, False]), Reason.INVALID_DTYPE, {"value": "bool"}),
        (torch.tensor([0.0, 1.0]), Reason.INVALID_DTYPE, {"value": "float32"}),
        (np.array(["a", "b"]), Reason.INVALID_DTYPE, {"value": "str32"}),
        (np.array([0]), Reason.INVALID_SHAPE, {"value": "[1]", "expected": "[2]"}),
        (np.array([0, 1, 2]), Reason.INVALID_SHAPE, {"value": "[3]", "expected": "[2]"}),
        (np.array([[0, 1]]), Reason.INVALID_SHAPE, {"value": "[1, 2]", "expected": "[2]"}),
        (np.array(0), Reason.INVALID_SHAPE, {"value": "[]", "expected": "[2]"}),
        (np.array([0, -1]), Reason.LABEL_OUT_OF_RANGE, {"position": "[1]", "value": "-1", "lowest": "0"}),
        (np.array([80, 0]), Reason.LABEL_OUT_OF_RANGE, {"position": "[0]", "value": "80", "highest": "79"}),
        (np.array([0, 255], np.uint8), Reason.LABEL_OUT_OF_RANGE, {"position": "[1]", "value": "255"}),
        (np.array([2**64 - 1, 0], np.uint64), Reason.LABEL_OUT_OF_RANGE, {"value": str(2**64 - 1)}),
        (torch.tensor([0, 80]), Reason.LABEL_OUT_OF_RANGE, {"position": "[1]", "value": "80"}),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, reason, values):
    error = refused_image(objects(labels=labels), num_classes=80)
    assert (error.reason, error.field) == (reason, "ground_truth[1].labels")
    assert values.items() <= error.values.items()


def test_a_label_that_is_too_large_for_the_answer_is_refused_where_any_class_goes():
    error = refused_image(objects(labels=np.array([0, 2**63], np.uint64)))
    assert (error.reason, error.field) == (Reason.LABEL_OUT_OF_RANGE, "ground_truth[1].labels")


def test_more_classes_than_a_labels_type_holds_is_no_fault():
    image = objects(labels=np.array([0, 127], np.int8))
    one_level().assign([image], SIZES, num_classes=300)


@pytest.mark.parametrize(
    ("boxes", "reason", "values"),
    [
        (np.array([BOX, BOX], np.complex64), Reason.INVALID_DTYPE, {"value": "complex64"}),
        (np.zeros((2, 4), bool), Reason.INVALID_DTYPE, {"value": "bool"}),
        (np.zeros((2, 4), object), Reason.INVALID_DTYPE, {"value": "object"}),
        (np.array(BOX), Reason.INVALID_SHAPE, {"value": "[4]"}),
        (np.zeros((2, 5)), Reason.INVALID_SHAPE, {"value": "[2, 5]", "expected": "[N, 4]"}),
        (np.zeros((0, 3)), Reason.INVALID_SHAPE, {"value": "[0, 3]"}),
        (np.zeros((1, 2, 4)), Reason.INVALID_SHAPE, {"value": "[1, 2, 4]"}),
        (np.float32(3), Reason.INVALID_SHAPE, {"value": "[]"}),
        (
            np.array([BOX, [30, 20, 10, 40]]),
            Reason.INVERTED_BOX,
            {"index": "1", "value": "[30.0, 20.0, 10.0, 40.0]"},
        ),
        (np.array([[10, 40, 30, 20], BOX]), Reason.INVERTED_BOX, {"index": "0"}),
        (np.array([BOX, [0, 0, math.nan, 1]]), Reason.NOT_FINITE, {"position": "[1, 2]", "value": "nan"}),
        (np.array([BOX, [0, 0, 1, math.inf]]), Reason.NOT_FINITE, {"position": "[1, 3]", "value": "inf"}),
        (np.array([[-math.inf, 0, 1, 1], BOX]), Reason.NOT_FINITE, {"position": "[0, 0]", "value": "-inf"}),
        (torch.tensor([BOX, [math.nan] * 4]).half(), Reason.NOT_FINITE, {"position": "[1, 0]"}),
    ],
)
def test_boxes_that_are_none_are_refused(boxes, reason, values):
    error = refused_image(objects(boxes=boxes))
    assert (error.reason, error.field) == (reason, "ground_truth[1].boxes")
    assert values.items() <= error.values.items()


@pytest.mark.parametrize("box_format", [BoxFormat.XYWH, BoxFormat.CXCYWH])
def test_a_box_of_negative_width_is_inverted(box_format):
    error = refused_image(objects(boxes=np.array([BOX, [10, 20, -1, 5]])), box_format=box_format)
    assert (error.reason, error.values["index"]) == (Reason.INVERTED_BOX, "1")


@pytest.mark.parametrize("box_format", [BoxFormat.XYWH, BoxFormat.CXCYWH])
@pytest.mark.parametrize(
    "box", [[0, 0, math.inf, 1], [math.inf, 0, math.inf, 1], [-math.inf, 0, math.inf, 1]]
)
def test_an_infinite_box_of_any_format_is_not_finite(box_format, box):
    error = refused_image(objects(boxes=np.array([BOX, box], np.float32)), box_format=box_format)
    assert error.reason == Reason.NOT_FINITE


@pytest.mark.parametrize("box_format", [BoxFormat.XYWH, BoxFormat.CXCYWH])
def test_a_box_whose_far_side_overflows_is_not_finite(box_format):
    error = refused_image(
        objects(boxes=np.array([BOX, [3e38, 0, 3e38, 1]], np.float32)), box_format=box_format
    )
    assert error.reason == Reason.NOT_FINITE


@pytest.mark.parametrize("key", ["boxes", "labels"])
def test_an_image_without_a_key_is_refused(key):
    image = objects()
    del image[key]
    error = refused_image(image)
    assert (error.reason, error.field) == (Reason.MISSING_FIELD, f"ground_truth[1].{key}")


def test_an_unknown_key_is_refused():
    error = refused_image(objects(masks=[]))
    assert (error.reason, error.field) == (Reason.UNEXPECTED_FIELD, "ground_truth[1].masks")


@pytest.mark.parametrize("image", [None, 7, [BOX], (np.zeros((1, 4)), np.zeros(1, int))])
def test_an_image_that_is_no_mapping_is_refused(image):
    error = refused_image(image)
    assert (error.reason, error.field) == (Reason.MISSING_FIELD, "ground_truth[1]")
    assert error.values == {"type": type(image).__name__}


@pytest.mark.parametrize(
    ("iscrowd", "reason"),
    [
        (np.array([True]), Reason.INVALID_SHAPE),
        (np.array([[True], [False]]), Reason.INVALID_SHAPE),
        (np.array([0.0, 1.0]), Reason.INVALID_DTYPE),
    ],
)
def test_crowd_flags_that_do_not_go_with_the_boxes_are_refused(iscrowd, reason):
    error = refused_image(objects(iscrowd=iscrowd))
    assert (error.reason, error.field) == (reason, "ground_truth[1].iscrowd")


@pytest.mark.parametrize(
    ("settings", "field", "values"),
    [
        ({"strides": ()}, "strides", {}),
        ({"strides": (0,)}, "strides[0]", {"value": "0"}),
        ({"strides": (-8,)}, "strides[0]", {"value": "-8"}),
        ({"strides": (2**20 + 1,)}, "strides[0]", {"value": "1048577"}),
        ({"strides": (math.nan,)}, "strides[0]", {"value": "nan"}),
        ({"strides": (8, 16)}, "regress_ranges", {"value": "1", "expected": "2"}),
        ({"regress_ranges": None}, "regress_ranges", {"value": "5", "expected": "1"}),
        ({"regress_ranges": ()}, "regress_ranges", {"value": "0", "expected": "1"}),
        ({"regress_ranges": ((64, 64),)}, "regress_ranges[0]", {"min": "64", "max": "64"}),
        ({"regress_ranges": ((64, -1),)}, "regress_ranges[0]", {"min": "64", "max": "-1"}),
        ({"regress_ranges": ((math.nan, 64),)}, "regress_ranges[0]", {"min": "nan"}),
        ({"regress_ranges": ((-1, math.nan),)}, "regress_ranges[0]", {"max": "nan"}),
        ({"regress_ranges": ((math.inf, math.inf),)}, "regress_ranges[0]", {"min": "inf", "max": "inf"}),
    ],
)
def test_settings_that_make_no_pyramid_are_refused(settings, field, values):
    error = refusal(lambda: one_level(**settings))
    assert (error.reason, error.field) == (Reason.INVALID_OPTION, field)
    assert values.items() <= error.values.items()


@pytest.mark.parametrize(
    ("sizes", "reason", "field", "values"),
    [
        ([], Reason.INVALID_SHAPE, "feature_sizes", {"value": "0", "expected": "1"}),
        ([(2, 2), (1, 1)], Reason.INVALID_SHAPE, "feature_sizes", {"value": "2", "expected": "1"}),
        ([(-1, 2)], Reason.INVALID_OPTION, "feature_sizes[0].height", {"value": "-1"}),
        ([(2, -1)], Reason.INVALID_OPTION, "feature_sizes[0].width", {"value": "-1"}),
        ([(2**14, 2**14 + 1)], Reason.MESSAGE_TOO_LARGE, "feature_sizes", {"value": str(2**28 + 2**14)}),
        ([(np.int64(2**40), np.int64(2**40))], Reason.MESSAGE_TOO_LARGE, "feature_sizes", {}),
        ([(2**40, 2**40)], Reason.MESSAGE_TOO_LARGE, "feature_sizes", {"value": str(2**80)}),
    ],
)
def test_level_sizes_that_cannot_be_are_refused(sizes, reason, field, values):
    error = refusal(lambda: one_level().assign([objects()], sizes))
    assert (error.reason, error.field) == (reason, field)
    assert values.items() <= error.values.items()


def test_a_negative_extent_beside_a_zero_one_is_refused():
    assert refusal(lambda: one_level().assign([], [(0, -1)])).field == "feature_sizes[0].width"


def test_a_huge_extent_beside_a_zero_one_is_refused_too():
    assert refusal(lambda: one_level().assign([objects()], [(0, 2**62)])).reason == Reason.MESSAGE_TOO_LARGE
    assert [level.reg.shape for level in one_level().assign([objects()], [(0, 2**28)]).dense()] == [
        (1, 4, 0, 2**28)
    ]
