"""`AssignTargets`: what the local assigner says, in both forms."""

import math

import numpy as np
import pytest

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd_server.targets import AssignerPreset, BoxFormat, FCOSAssigner
from tests.service.support import assign_request, objects, scene

SPARSE_FIELDS = ("locations", "labels", "ltrb", "centerness", "matched", "ignored")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def same(tensor, expected) -> bool:
    array = unpack(tensor)
    return array.dtype == expected.dtype and np.array_equal(array, expected)


def is_dense(result, assignment) -> bool:
    return all(
        same(level.cls, expected.cls)
        and same(level.reg, expected.reg)
        and same(level.centerness, expected.centerness)
        and (
            not level.HasField("ignored")
            if expected.ignored is None
            else same(level.ignored, expected.ignored)
        )
        for level, expected in zip(result.dense.levels, assignment.dense(), strict=True)
    )


def is_sparse(result, assignment) -> bool:
    expected = assignment.sparse()
    return all(same(getattr(result.sparse, name), getattr(expected, name)) for name in SPARSE_FIELDS)


FORMS = pytest.mark.parametrize(
    ("form", "matches"),
    [
        (pb.TARGET_FORMAT_UNSPECIFIED, is_dense),
        (pb.TARGET_FORMAT_DENSE, is_dense),
        (pb.TARGET_FORMAT_SPARSE, is_sparse),
    ],
    ids=["default", "dense", "sparse"],
)


@FORMS
def test_equals_the_local_assigner(stub, rng, form, matches):
    images = [scene(rng, (480, 640), 12) for _ in range(3)]
    (result,) = stub.AssignTargets(assign_request(images, (480, 640), format=form)).results
    assigner = FCOSAssigner()
    assignment = assigner.assign(images, assigner.feature_sizes((480, 640)))
    assert matches(result, assignment)
    assert list(result.positive_counts) == assignment.positive_counts()
    assert sum(result.positive_counts) > 0
    assert [(s.height, s.width) for s in result.feature_sizes] == assigner.feature_sizes((480, 640))
    assert result.preset == losses_pb2.ASSIGNER_PRESET_AUTOTIMM


@FORMS
def test_crowd_regions_are_ignored(stub, rng, form, matches):
    image = scene(rng, (128, 128), 6)
    image["iscrowd"] = np.array([0, 1, 0, 0, 1, 0])
    (result,) = stub.AssignTargets(assign_request([image], (128, 128), format=form)).results
    assigner = FCOSAssigner()
    assignment = assigner.assign([image], assigner.feature_sizes((128, 128)))
    assert assignment.ignored is not None
    assert matches(result, assignment)


@FORMS
@pytest.mark.parametrize("name", ["xyxy", "xywh", "cxcywh"])
def test_box_formats(stub, rng, form, matches, name):
    images = [scene(rng, (96, 96), 5)]
    wire = losses_pb2.BoxFormat.Value(f"BOX_FORMAT_{name.upper()}")
    assigner = losses_pb2.FCOSAssigner(box_format=wire)
    request = assign_request(images, (200, 200), format=form, assigner=assigner)
    (result,) = stub.AssignTargets(request).results
    local = FCOSAssigner(box_format=BoxFormat(name))
    assert matches(result, local.assign(images, local.feature_sizes((200, 200))))


@FORMS
def test_own_strides_and_ranges(stub, rng, form, matches):
    ranges = [(-1.0, 20.0), (20.0, math.inf)]
    assigner = losses_pb2.FCOSAssigner(
        preset=losses_pb2.ASSIGNER_PRESET_AUTOTIMM,
        strides=[4, 10],
        regress_ranges=[losses_pb2.RegressRange(min=low, max=high) for low, high in ranges],
    )
    images = [scene(rng, (70, 50), 5)]
    request = assign_request(images, (70, 50), format=form, assigner=assigner)
    (result,) = stub.AssignTargets(request).results
    local = FCOSAssigner(strides=(4, 10), regress_ranges=tuple(ranges), preset=AssignerPreset.AUTOTIMM)
    assert [(s.height, s.width) for s in result.feature_sizes] == [(18, 13), (7, 5)]
    assert matches(result, local.assign(images, [(18, 13), (7, 5)]))


@FORMS
def test_image_size_means_the_feature_sizes_of_its_strides(stub, rng, form, matches):
    images = [scene(rng, (101, 203), 8)]
    by_image = assign_request(images, (101, 203), format=form)
    sizes = FCOSAssigner().feature_sizes((101, 203))
    by_level = pb.AssignTargetsRequest(format=form)
    by_level.items.add(
        ground_truth=map(objects, images), feature_sizes=[pb.Size(height=h, width=w) for h, w in sizes]
    )
    answers = [stub.AssignTargets(request).results[0] for request in (by_image, by_level)]
    assert answers[0] == answers[1]
    assert matches(answers[0], FCOSAssigner().assign(images, sizes))


@FORMS
def test_items_of_different_sizes_equal_their_own(stub, rng, form, matches):
    request = pb.AssignTargetsRequest(format=form)
    for size, count in (((64, 64), 1), ((300, 40), 3), ((0, 0), 1), ((1, 1), 2)):
        images = [scene(rng, (64, 64), 3) for _ in range(count)]
        request.items.extend(assign_request(images, size).items)
    results = stub.AssignTargets(request).results
    for item, result in zip(request.items, results, strict=True):
        alone = stub.AssignTargets(pb.AssignTargetsRequest(format=form, items=[item])).results
        assert list(alone) == [result]


@FORMS
def test_no_objects_and_no_images(stub, form, matches):
    empty = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
    for images in ([], [empty], [empty, empty]):
        (result,) = stub.AssignTargets(assign_request(images, (64, 64), format=form)).results
        assigner = FCOSAssigner()
        assert matches(result, assigner.assign(images, assigner.feature_sizes((64, 64))))
        assert sum(result.positive_counts) == 0


def test_integer_boxes_and_small_labels(stub):
    image = {"boxes": np.array([[4, 4, 40, 40]], np.int16), "labels": np.array([250], np.uint8)}
    (result,) = stub.AssignTargets(assign_request([image], (64, 64), format=pb.TARGET_FORMAT_SPARSE)).results
    labels = unpack(result.sparse.labels)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == {250}


def test_timings_are_set(stub, rng):
    timings = stub.AssignTargets(assign_request([scene(rng, (64, 64))])).timings
    assert timings.decode_us > 0
    assert timings.compute_us > 0
    assert timings.queue_us >= 0
