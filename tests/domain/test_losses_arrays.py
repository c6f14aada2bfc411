"""Losses evaluated as arrays: to the bit what tensors give, and only where that is all there is."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossd_server.engine.transfer import from_host
from lossd_server.kernels import load_library
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss
from lossd_server.losses.arrays import are_places
from tests.domain.support import needs_a_compiler

FLOATS = ("float32", "float16", ml_dtypes.bfloat16)
GRADIENT_TYPES = {
    None: None,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float64: np.float64,
}
NARROW = {
    "dtype": st.sampled_from(FLOATS),
    "gradient_dtype": st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]),
}
LABEL_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

pytestmark = needs_a_compiler


@pytest.fixture(autouse=True, scope="module")
def _kernel():
    assert load_library() is not None


def inputs_of(shape, seed=0, label_type="int64", dtype="float32"):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(shape, np.float32) * 3).astype(dtype)
    lowest = -1 if label_type.startswith("int") else 0
    labels = rng.integers(lowest, shape[1], (shape[0], *shape[2:])).astype(label_type)
    return {"inputs": logits, "targets": labels}


def levels(value):
    return value if isinstance(value, list) else [value]


def by_arrays(loss, arguments, *, gradients=None, **options):
    gradients = loss.differentiable if gradients is None else gradients
    prepared = loss.prepare(arguments)
    wanted = GRADIENT_TYPES[options.get("gradient_dtype")]
    places = {
        name: [np.full(each.shape, np.nan, wanted or each.dtype) for each in levels(arguments[name])]
        for name in gradients
    }
    return loss.evaluate_arrays(prepared, EvaluationOptions(gradients=gradients, **options), places.get)


def by_tensors(loss, arguments, *, gradients=None, **options):
    gradients = loss.differentiable if gradients is None else gradients
    return loss.evaluate(
        loss.prepare(tensors_of(arguments)), EvaluationOptions(gradients=gradients, **options)
    )


def tensors_of(value):
    """The same arguments as tensors; objects of the ground truth are read on the host as they are."""
    if isinstance(value, dict):
        return {name: each if name == "ground_truth" else tensors_of(each) for name, each in value.items()}
    return list(map(tensors_of, value)) if isinstance(value, list) else from_host(value)


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 90)),
        st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40)),
    ),
    label_type=st.sampled_from(LABEL_TYPES),
    gradients=st.sampled_from([(), ("inputs",)]),
    reduction=st.sampled_from(["mean", "sum"]),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0]),
    normalizer=st.sampled_from([None, 0.25, 37.0]),
    seed=st.integers(0, 99),
    **NARROW,
)
def test_the_bits_are_those_of_tensors(
    shape, label_type, gradients, reduction, gamma, normalizer, seed, dtype, gradient_dtype
):
    loss = FocalLoss(gamma=gamma, reduction=reduction)
    assert_has_the_bits_of_tensors(
        loss,
        inputs_of(shape, seed, label_type, dtype),
        gradients=gradients,
        normalizer=normalizer if reduction == "mean" else None,
        gradient_dtype=gradient_dtype,
    )


def on_host(tensor):
    """The array of a tensor, in ml_dtypes's bfloat16 where it is of that."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_has_the_bits_of_tensors(loss, arguments, **options):
    found, expected = by_arrays(loss, arguments, **options), by_tensors(loss, arguments, **options)
    assert found.loss.shape == ()
    assert found.loss.tobytes() == expected.loss.numpy().tobytes()
    for name, numbers in expected.raw_sums.items():
        assert [level[name] for level in found.raw_sums] == numbers.tolist()
    assert all(level.keys() == expected.raw_sums.keys() for level in found.raw_sums)
    assert list(found.components) == [(c.name, float(c.value), c.weight) for c in expected.components]
    assert found.preset is expected.preset
    assert found.negative_side_count == int(expected.negative_side_count)
    assert {name: [*map(list, rows)] for name, rows in found.nonzero_rows.items()} == {
        name: [*map(list, rows)] for name, rows in expected.nonzero_rows.items()
    }
    assert set(found.gradients) == set(options["gradients"])
    for name, gradients in found.gradients.items():
        wanted = levels(expected.gradients[name])
        assert [each.dtype for each in gradients] == [on_host(each).dtype for each in wanted]
        assert [each.tobytes() for each in gradients] == [on_host(each).tobytes() for each in wanted]


def boxes_of(count, seed=0, target_type="f4", weight_type=None, dtype="f4"):
    rng = np.random.default_rng(seed)
    pred, target = (rng.uniform(0, 50, (count, 2, 2)).cumsum(axis=1).reshape(count, 4) for _ in range(2))
    arguments = {"pred_boxes": pred.astype(dtype), "target_boxes": target.astype(target_type)}
    return arguments | weights_of(rng, count, weight_type)


def centerness_of(shape, seed=0, target_type="f4", weight_type=None, dtype="f4"):
    rng = np.random.default_rng(seed)
    pred, target = rng.standard_normal(shape, np.float32) * 4, rng.uniform(0, 1, shape).astype(target_type)
    return {"pred": pred.astype(dtype), "target": target} | weights_of(rng, shape, weight_type)


def weights_of(rng, shape, dtype):
    return {} if dtype is None else {"weights": rng.uniform(0, 2, shape).astype(dtype)}


ROWS = {
    "seed": st.integers(0, 99),
    "weight_type": st.sampled_from([None, "f8", *FLOATS]),
    "reduction": st.sampled_from(["mean", "sum"]),
    "normalizer": st.sampled_from([None, 0.25, 37.0]),
    "wanted": st.booleans(),
    **NARROW,
}


@given(
    count=st.one_of(st.integers(1, 200), st.just(5000)),
    target_type=st.sampled_from(["f8", *FLOATS, *LABEL_TYPES]),
    **ROWS,
)
def test_boxes_have_the_bits_of_tensors(count, reduction, normalizer, wanted, gradient_dtype, **about):
    assert_has_the_bits_of_tensors(
        GIoULoss(reduction=reduction),
        boxes_of(count, **about),
        gradients=("pred_boxes",) if wanted else (),
        normalizer=normalizer if reduction == "mean" else None,
        gradient_dtype=gradient_dtype,
    )


@given(
    shape=st.one_of(st.tuples(st.integers(1, 200)), st.tuples(st.integers(1, 5000), st.just(1))),
    target_type=st.sampled_from(["f8", *FLOATS]),
    **ROWS,
)
def test_centerness_has_the_bits_of_tensors(shape, reduction, normalizer, wanted, gradient_dtype, **about):
    assert_has_the_bits_of_tensors(
        CenternessLoss(reduction=reduction),
        centerness_of(shape, **about),
        gradients=("pred",) if wanted else (),
        normalizer=normalizer if reduction == "mean" else None,
        gradient_dtype=gradient_dtype,
    )


SIZES = [(9, 11), (5, 6), (3, 3)]
LEVELS = {"strides": (8, 16, 32), "regress_ranges": ((-1, 32), (32, 64), (64, 1e8))}


def head_of(batch, seed=0, dtype="f4"):
    """Predictions of three levels, some of them with negative sides, and boxes with a crowd region."""
    rng = np.random.default_rng(seed)
    channels = {"cls_preds": 3, "reg_preds": 4, "centerness_preds": 1}
    maps = {
        name: [(rng.standard_normal((batch, count, *size)) * count).astype(dtype) for size in SIZES]
        for name, count in channels.items()
    }
    corners = rng.uniform(0, 40, (batch, 4, 2, 2)).cumsum(axis=2).reshape(batch, 4, 4).astype("f4")
    crowd = np.array([False, False, False, True])
    objects = [{"boxes": boxes, "labels": rng.integers(0, 3, 4), "iscrowd": crowd} for boxes in corners]
    return {**maps, "ground_truth": objects}


def dense_head_of(batch, seed=0, label_type="i8", target_type="f4", dtype="f4"):
    """The same with the targets of every location."""
    arguments = head_of(batch, seed, dtype)
    found = FCOSLoss(3, **LEVELS).assigner.assign(arguments.pop("ground_truth"), SIZES).dense()
    return {
        **arguments,
        "cls_targets": [level.cls.astype(label_type) for level in found],
        "reg_targets": [level.reg.astype(target_type) for level in found],
        "centerness_targets": [level.centerness.astype(target_type) for level in found],
        "ignored_targets": [level.ignored for level in found],
    }


HEADS = {
    "batch": st.integers(1, 3),
    "seed": st.integers(0, 99),
    "preset": st.sampled_from(["autotimm", "documented"]),
    "gamma": st.sampled_from([1.0, 2.0]),
    "gradients": st.lists(st.sampled_from(FCOSLoss.differentiable), unique=True).map(tuple),
    "component_gradients": st.booleans(),
    "normalizer": st.sampled_from([None, 0.25, 37.0]),
    "nonzero_rows": st.booleans(),
    **NARROW,
}


@given(**HEADS)
def test_heads_with_ground_truth_have_the_bits_of_tensors(batch, seed, preset, gamma, dtype, **options):
    loss = FCOSLoss(3, focal_gamma=gamma, reg_weight=2.5, preset=preset, **LEVELS)
    assert_has_the_bits_of_tensors(loss, head_of(batch, seed, dtype), **options)


@given(
    label_type=st.sampled_from(["i1", "i2", "i4", "i8"]),
    target_type=st.sampled_from(["f2", "f4", "f8"]),
    **HEADS,
)
def test_heads_with_dense_targets_have_the_bits_of_tensors(
    batch, seed, preset, gamma, label_type, target_type, dtype, **options
):
    loss = FCOSLoss(3, focal_gamma=gamma, centerness_weight=0.5, preset=preset, **LEVELS)
    arguments = dense_head_of(batch, seed, label_type, target_type, dtype)
    assert_has_the_bits_of_tensors(loss, arguments, **options)


def head_with(name, value):
    """A head with one number of a prediction replaced."""
    arguments = head_of(2)
    arguments[name][1].reshape(-1)[3] = value
    return arguments


def head_in(name, dtype):
    """A head with one prediction in another type."""
    arguments = head_of(2)
    arguments[name][1] = arguments[name][1].astype(dtype)
    return arguments


def boxes_with(name, value):
    """Boxes with one number of an argument replaced."""
    arguments = boxes_of(5, weight_type="f4")
    arguments[name].reshape(-1)[3] = value
    return arguments


def stray(value, dtype="float32"):
    arguments = inputs_of((2, 5, 3, 4), dtype=dtype)
    arguments["inputs"][1, 2, 0, 3] = value
    return arguments


@pytest.mark.parametrize(
    ("loss", "arguments", "options"),
    [
        (GIoULoss(reduction="none"), boxes_of(7), {}),
        (GIoULoss(), boxes_of(7), {"gradient_dtype": torch.float64}),
        (GIoULoss(), {**boxes_of(7), "pred_boxes": np.zeros((7, 4))}, {}),
        (GIoULoss(), {**boxes_of(7), "pred_boxes": np.zeros((4, 7), np.float32).T}, {}),
        (GIoULoss(), boxes_of(0), {}),
        (GIoULoss(), boxes_with("pred_boxes", np.nan), {}),
        (GIoULoss(), boxes_with("target_boxes", np.inf), {}),
        (GIoULoss(reduction="sum"), boxes_with("weights", 3.4e38), {}),
        (CenternessLoss(reduction="none"), centerness_of((7,)), {}),
        (CenternessLoss(), {**centerness_of((7,)), "target": np.zeros(14, np.float32)[::2]}, {}),
        (FocalLoss(reduction="none"), inputs_of((7, 5)), {}),
        (FocalLoss(gamma=2.5), inputs_of((7, 5)), {}),
        (FocalLoss(), inputs_of((7, 5)), {"gradient_dtype": torch.float64}),
        (FocalLoss(), {**inputs_of((7, 5)), "inputs": np.zeros((7, 5))}, {}),
        (FocalLoss(), stray(np.nan, "float16"), {}),
        (GIoULoss(), {**boxes_of(7), "weights": np.full(7, np.inf, ml_dtypes.bfloat16)}, {}),
        (FocalLoss(), {**inputs_of((7, 5)), "inputs": np.zeros((5, 7), np.float32).T}, {}),
        (FocalLoss(), {**inputs_of((7, 5)), "targets": np.zeros(14, np.int64)[::2]}, {}),
        (FocalLoss(), inputs_of((0, 5)), {}),
        (FocalLoss(), stray(np.nan), {}),
        (FocalLoss(), stray(-np.inf), {}),
        (FocalLoss(reduction="sum"), {**inputs_of((7, 5)), "inputs": np.full((7, 5), 3e38, np.float32)}, {}),
        *((FCOSLoss(3, **LEVELS), head_with(name, np.nan), {}) for name in FCOSLoss.differentiable),
        *((FCOSLoss(3, **LEVELS), head_in(name, np.float64), {}) for name in FCOSLoss.differentiable),
        (FCOSLoss(3, **LEVELS), head_of(0), {}),
        (FCOSLoss(3, **LEVELS), head_of(2), {"gradient_dtype": torch.float64}),
        (FCOSLoss(3, focal_gamma=1.5, **LEVELS), head_of(2), {}),
        (FCOSLoss(3, cls_weight=3e38, **LEVELS), head_of(2), {}),
    ],
    ids=[
        *("one number a box", "another type of gradient of boxes", "float64 boxes"),
        *("boxes side by side", "no boxes", "NaN in a box", "a box without end"),
        *("weights beyond float32", "one centerness a row", "gaps between targets"),
        *("one number a row", "a gamma that is not whole", "another type of gradient", "float64"),
        *("NaN in float16", "weights without end in bfloat16"),
        *("gaps between logits", "gaps between labels", "no rows", "NaN", "infinity", "beyond float32"),
        *(f"NaN in {name}" for name in FCOSLoss.differentiable),
        *(f"float64 {name}" for name in FCOSLoss.differentiable),
        *("no images", "another type of gradient of a head", "a gamma of a head that is not whole"),
        "a head beyond float32",
    ],
)
def test_what_needs_more_than_the_kernel_is_left_to_tensors(loss, arguments, options):
    assert by_arrays(loss, arguments, **options) is None


def places_other_than(shape):
    """Arrays of a shape that the kernels do not write to: in another order or type, and read-only."""
    fixed = np.zeros(shape, np.float32)
    fixed.flags.writeable = False
    return np.zeros(shape, np.float32, order="F"), np.zeros(shape), fixed


def test_compiled_code_writes_to_arrays_in_order_and_of_the_type_and_shape_that_are_wanted():
    prediction = np.zeros((7, 5), np.float32)
    others = *places_other_than((7, 5)), np.zeros((1, 5), np.float32)
    assert are_places([np.zeros((7, 5), np.float32)], [prediction], None)
    assert are_places([np.zeros((7, 5), np.float16)], [prediction], torch.float16)
    assert not are_places([np.zeros((7, 5))], [prediction], torch.float64)
    for place in others:
        assert not are_places([place], [prediction], None)
        assert not are_places([prediction.copy(), place], [prediction, prediction], None)


def with_strides_of_one_location(logits):
    """The same logits `[1, C, 1, 1]`, as a map has them whose channels are last, cut to one location."""
    wide = np.zeros((1, 2, 3, logits.shape[1]), np.float32)
    wide[:, :1, :1] = logits.transpose(0, 2, 3, 1)
    return wide.transpose(0, 3, 1, 2)[:, :, :1, :1]


def test_an_axis_of_one_decides_the_order_of_a_sum_and_so_is_as_in_tensors():
    row = np.random.default_rng(0).standard_normal((77, 1), np.float32).T
    assert row.flags.c_contiguous
    arguments = {"inputs": row, "targets": np.zeros(1, np.int64)}
    assert_has_the_bits_of_tensors(FocalLoss(), arguments, gradients=("inputs",))


def test_a_location_that_was_cut_out_is_left_to_tensors():
    logits = with_strides_of_one_location(inputs_of((1, 77, 1, 1))["inputs"])
    assert logits.flags.c_contiguous
    assert by_arrays(FocalLoss(), {"inputs": logits, "targets": np.zeros((1, 1, 1), np.int64)}) is None


def test_tensors_are_left_to_tensors():
    given = [
        (FocalLoss(), inputs_of((7, 5))),
        (GIoULoss(), boxes_of(7)),
        (CenternessLoss(), centerness_of((7,))),
        (FCOSLoss(3, **LEVELS), head_of(2)),
    ]
    for loss, arguments in given:
        prepared = loss.prepare(tensors_of(arguments))
        assert loss.evaluate_arrays(prepared, EvaluationOptions(), None) is None
