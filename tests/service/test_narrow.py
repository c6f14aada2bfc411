"""What takes fewer bytes on the wire: sparse gradients, the smaller form of targets, narrow labels."""

import numpy as np
import pytest

from lossd.sparse import unpack_sparse
from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from tests.service.support import (
    CLASSES,
    assign_request,
    fcos_dense_arrays,
    fcos_truth_arrays,
    focal_grid_arrays,
    loss_request,
)

PREDICTIONS = ("cls_preds", "reg_preds", "centerness_preds")
PRESETS = {"autotimm": losses_pb2.LOSS_PRESET_AUTOTIMM, "documented": losses_pb2.LOSS_PRESET_DOCUMENTED}
FEW = {"boxes": np.array([[20, 20, 50, 50]], np.float32), "labels": np.array([1])}
NONE = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}


def fcos_request(preset="documented", objects=FEW, **settings):
    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 2), "ground_truth": [objects, NONE]}
    config = losses_pb2.FCOSLoss(num_classes=CLASSES, preset=PRESETS[preset])
    return loss_request(config, [arrays], gradients=PREDICTIONS, **settings)


def gradients_of(response):
    return {gradient.input: gradient for gradient in response.results[0].gradients}


def shape_of(request, name, level):
    return tuple(getattr(request.items[0].fcos, name)[level].shape)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [tensor_pb2.DATA_TYPE_UNSPECIFIED, tensor_pb2.DATA_TYPE_BFLOAT16])
@pytest.mark.parametrize("objects", [FEW, NONE], ids=["few", "none"])
def test_sparse_gradients_are_the_dense_ones(stub, preset, dtype, objects):
    request = fcos_request(preset, objects, gradient_dtype=dtype)
    dense = gradients_of(stub.ComputeLoss(request))
    request.sparse_gradients = True
    sparse = gradients_of(stub.ComputeLoss(request))
    assert list(sparse) == list(PREDICTIONS)
    for name, gradient in sparse.items():
        assert not dense[name].sparse
        if name == "cls_preds" and preset == "documented":  # background has a gradient
            assert gradient == dense[name]
            continue
        assert not gradient.tensors
        assert gradient.ByteSize() < dense[name].ByteSize()
        for level, (found, expected) in enumerate(zip(gradient.sparse, dense[name].tensors, strict=True)):
            array = unpack_sparse(found, shape_of(request, name, level))
            assert array.dtype == unpack(expected).dtype
            assert array.tobytes() == unpack(expected).tobytes()


def test_gradients_that_would_be_larger_stay_dense(stub):
    boxes = np.array([[x, y, x + 32, y + 32] for x in range(0, 96, 16) for y in range(0, 64, 16)], np.float32)
    objects = {"boxes": boxes, "labels": np.zeros(len(boxes), np.int64)}
    request = fcos_request(objects=objects, sparse_gradients=True)
    del request.items[:]
    arrays = {**fcos_truth_arrays(np.random.default_rng(0), 1), "ground_truth": [objects]}
    request.items.extend(loss_request(losses_pb2.FCOSLoss(num_classes=CLASSES), [arrays]).items)
    answer = gradients_of(stub.ComputeLoss(request))
    assert answer["centerness_preds"].tensors
    assert not answer["centerness_preds"].sparse


def test_other_losses_have_no_sparse_gradients(stub):
    arrays = focal_grid_arrays(np.random.default_rng(0), 5)
    request = loss_request(losses_pb2.FocalLoss(), [arrays], gradients=["inputs"], sparse_gradients=True)
    (gradient,) = stub.ComputeLoss(request).results[0].gradients
    assert len(gradient.tensors) == 1
    assert not gradient.sparse


@pytest.mark.parametrize("narrow", [False, True])
def test_the_smaller_form_of_targets(stub, narrow):
    crowd = {**FEW, "iscrowd": np.array([True])}
    covering = np.repeat(np.array([[4, 4, 60, 60]], np.float32), 1, axis=0)
    full = {"boxes": covering, "labels": np.array([0])}
    wide = {"boxes": np.array([[0, 0, 800, 520]], np.float32), "labels": np.array([3])}
    wider = {"boxes": np.array([[0, 0, 800, 650]], np.float32), "labels": np.array([3])}
    for images, size, form in (
        ([FEW, NONE], (64, 96), "sparse"),
        ([crowd, FEW], (64, 96), "sparse"),
        ([full], (56, 56), "dense"),
        ([wide], (800, 800), "sparse" if narrow else "dense"),
        ([{**wide, "labels": np.array([300])}], (800, 800), "sparse" if narrow else "dense"),
        ([wider], (800, 800), "dense"),
        ([{**wider, "labels": np.array([300])}], (800, 800), "sparse" if narrow else "dense"),
    ):
        request = assign_request(images, size, format=pb.TARGET_FORMAT_SMALLER, narrow_integers=narrow)
        request.assigner.strides.append(8)
        request.assigner.regress_ranges.add(min=-1, max=1000)
        (found,) = stub.AssignTargets(request).results
        assert found.WhichOneof("targets") == form
        sizes = {}
        for name, asked in (("dense", pb.TARGET_FORMAT_DENSE), ("sparse", pb.TARGET_FORMAT_SPARSE)):
            request.format = asked
            (result,) = stub.AssignTargets(request).results
            sizes[name] = result.ByteSize()
            if name == form:
                assert result == found
        assert min(sizes, key=sizes.get) == form


@pytest.mark.parametrize("form", [pb.TARGET_FORMAT_DENSE, pb.TARGET_FORMAT_SPARSE])
def test_integers_of_targets_in_fewer_bytes(stub, form):
    corners = np.array([[40 * x, 60 * y] for x in range(20) for y in range(20)], np.float32)
    many = {"boxes": np.concatenate([corners, corners + 40], axis=1), "labels": np.arange(400)}
    crowd = {"boxes": np.array([[4, 4, 500, 500]], np.float32), "labels": np.ones(1, int)}
    crowd["iscrowd"] = np.array([True])
    request = assign_request([many, crowd], (1333, 800), format=form)
    (wide,) = stub.AssignTargets(request).results
    request.narrow_integers = True
    (narrow,) = stub.AssignTargets(request).results
    if form == pb.TARGET_FORMAT_DENSE:
        for one, other in zip(narrow.dense.levels, wide.dense.levels, strict=True):
            assert same_numbers(one.cls, other.cls)
            for name in ("reg", "centerness", "ignored"):
                assert getattr(one, name) == getattr(other, name)
        assert narrow.dense.levels[0].cls.dtype == tensor_pb2.DATA_TYPE_INT16
        assert narrow.dense.levels[-1].cls.dtype == tensor_pb2.DATA_TYPE_INT64, "too few to be looked at"
    else:
        for name in ("locations", "labels", "matched", "ignored"):
            assert same_numbers(getattr(narrow.sparse, name), getattr(wide.sparse, name))
        for name in ("ltrb", "centerness"):
            assert getattr(narrow.sparse, name) == getattr(wide.sparse, name)
        assert narrow.sparse.labels.dtype == tensor_pb2.DATA_TYPE_INT16
        assert narrow.sparse.ignored.dtype == tensor_pb2.DATA_TYPE_INT8
    assert narrow.ByteSize() < 0.8 * wide.ByteSize()


def same_numbers(tensor, other):
    return np.array_equal(unpack(tensor), unpack(other))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8])
def test_narrow_labels_are_labels(stub, dtype):
    rng = np.random.default_rng(0)
    focal, dense = focal_grid_arrays(rng, 5), fcos_dense_arrays(rng, 2)
    labels = np.maximum(focal["targets"], 0)
    truth = fcos_truth_arrays(rng, 2)
    narrow_truth = [{**image, "labels": image["labels"].astype(dtype)} for image in truth["ground_truth"]]
    signed = dtype if dtype is not np.uint8 else np.int8
    fcos = losses_pb2.FCOSLoss(num_classes=CLASSES)
    for config, wide, narrow in (
        (losses_pb2.FocalLoss(), {"targets": labels}, {"targets": labels.astype(dtype)}),
        (fcos, {}, {"cls_targets": [level.astype(signed) for level in dense["cls_targets"]]}),
        (fcos, {"ground_truth": truth["ground_truth"]}, {"ground_truth": narrow_truth}),
    ):
        arrays = focal if config is not fcos else truth if "ground_truth" in narrow else dense
        gradients = ["inputs"] if config is not fcos else PREDICTIONS
        results = [
            stub.ComputeLoss(loss_request(config, [{**arrays, **change}], gradients=gradients)).results
            for change in (wide, narrow)
        ]
        assert results[0] == results[1]
