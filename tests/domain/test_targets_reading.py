"""Objects are read to the same bits, and refused in the same words, by compiled code and by numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossd_server.errors import InvalidInputError
from lossd_server.kernels import load_library
from lossd_server.targets import BoxFormat, GroundTruth
from lossd_server.targets.ground_truth import read_objects
from lossd_server.targets.native_reading import read_natively
from tests.domain.support import needs_a_compiler, without_kernels

pytestmark = needs_a_compiler

LARGEST = float(np.finfo(np.float32).max)
sides = st.one_of(
    st.floats(-1000, 1000, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, LARGEST, -LARGEST, float("inf"), float("-inf"), float("nan")]),
)

LABEL_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled before anything is timed."""
    assert load_library() is not None


def misplaced(array):
    """The same numbers, not where the processor wants them."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    copy = room[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@st.composite
def images(draw):
    """Boxes, mostly in order, with labels that mostly fit."""
    corners = draw(st.lists(st.tuples(*[sides] * 4), max_size=5))
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    if draw(st.booleans()):
        boxes = np.concatenate([np.sort(boxes[:, ::2]), np.sort(boxes[:, 1::2])], axis=1)[:, [0, 2, 1, 3]]
    boxes = draw(st.sampled_from([boxes, np.asfortranarray(boxes), misplaced(boxes)]))
    kind = np.dtype(draw(st.sampled_from(LABEL_TYPES)))
    count = len(boxes) + draw(st.sampled_from([0, 0, 0, 1]))
    numbers = st.one_of(st.integers(0, 9), st.integers(np.iinfo(kind).min, np.iinfo(kind).max))
    labels = np.array(draw(st.lists(numbers, min_size=count, max_size=count)), kind)
    return boxes, labels[::-1] if draw(st.booleans()) else labels


def outcome(boxes, labels, box_format, classes):
    """What reading comes to: the arrays, or the refusal."""
    try:
        found = read_objects(
            GroundTruth(boxes=boxes, labels=labels), box_format, field="image", num_classes=classes
        )
    except InvalidInputError as error:
        return str(error), error.reason, error.values
    assert found.boxes.flags.c_contiguous
    assert found.labels.flags.c_contiguous
    return found.boxes.dtype, found.boxes.tobytes(), found.labels.dtype, found.labels.tobytes()


@given(images(), st.sampled_from(BoxFormat), st.sampled_from([None, 1, 10, 2**80]))
def test_reading_is_the_same_in_c_and_in_numpy(image, box_format, classes):
    ours = outcome(*image, box_format, classes)
    assert ours == without_kernels(lambda: outcome(*image, box_format, classes))


@pytest.mark.parametrize("box_format", BoxFormat)
def test_what_most_callers_send_is_read_in_one_pass(box_format):
    boxes, labels = np.ones((3, 4), np.float32), np.arange(3, dtype=np.int32)
    read_boxes, read_labels = read_natively(boxes, labels, box_format, 80)
    assert read_labels.tolist() == [0, 1, 2]
    expected = {"xyxy": [1, 1, 1, 1], "xywh": [1, 1, 2, 2], "cxcywh": [0.5, 0.5, 1.5, 1.5]}[box_format]
    assert read_boxes.tolist() == [expected] * 3
    assert not np.shares_memory(read_boxes, boxes)
