"""`ComputeLoss`: the numbers of the local modules, bit for bit, and all that comes with them."""

import numpy as np
import pytest
import torch

from lossd.tensors import unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from tests.service.custom_modules import Squared
from tests.service.support import (
    BFLOAT16,
    CASES,
    CLASSES,
    FLOATS,
    evaluate_locally,
    focal_arrays,
    giou_arrays,
    loss_request,
    same_bits,
)

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def gradients_match(result, evaluation) -> bool:
    for gradient in result.gradients:
        expected = evaluation.gradients[gradient.input]
        levels = expected if isinstance(expected, list) else [expected]
        pairs = zip(gradient.tensors, levels, strict=True)
        if not all(same_bits(tensor, level) for tensor, level in pairs):
            return False
    return [g.input for g in result.gradients] == list(evaluation.gradients)


@EVERY_CASE
@pytest.mark.parametrize("n", [1, 9])
def test_equals_the_local_module_bit_for_bit(stub, rng, case, n):
    arrays = case.arrays(rng, n)
    names = case.module.differentiable
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays], gradients=names)).results
    evaluation = evaluate_locally(case, arrays, gradients=names)
    assert same_bits(result.loss, evaluation.loss)
    assert gradients_match(result, evaluation)
    assert [(c.name, c.value, c.weight) for c in result.components] == [
        (c.name, float(c.value), c.weight) for c in evaluation.components
    ]
    for name, levels in evaluation.raw_sums.items():
        assert [getattr(sums, name) for sums in result.raw_sums] == levels.tolist()


@pytest.mark.parametrize("name", ["focal", "focal-grid", "giou", "centerness", "centerness-sum"])
def test_equals_autograd_through_the_local_module(stub, rng, name):
    case = CASES[name]
    arrays = case.arrays(rng, 4)
    name = case.module.differentiable[0]
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays], gradients=[name])).results
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    tensors[name].requires_grad_()
    loss = case.module(**tensors)
    loss.backward()
    assert same_bits(result.loss, loss.detach())
    assert same_bits(result.gradients[0].tensors[0], tensors[name].grad)


@EVERY_CASE
def test_batch_of_mixed_shapes_is_bit_identical_to_its_items(stub, rng, case):
    items = [case.arrays(rng, n) for n in (1, 6, 2, 3)]
    names = case.module.differentiable
    batch = stub.ComputeLoss(loss_request(case.config, items, gradients=names)).results
    for arrays, result in zip(items, batch, strict=True):
        (alone,) = stub.ComputeLoss(loss_request(case.config, [arrays], gradients=names)).results
        assert result.SerializeToString(deterministic=True) == alone.SerializeToString(deterministic=True)


def cast(value, dtype):
    if isinstance(value, list):
        return [cast(entry, dtype) for entry in value]
    floating = isinstance(value, np.ndarray) and value.dtype == np.float32
    return value.astype(dtype) if floating else value


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_float_type(stub, rng, case, dtype):
    numpy_type = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = {name: cast(value, numpy_type) for name, value in case.arrays(rng, 3).items()}
    names = case.module.differentiable
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays], gradients=names)).results
    evaluation = evaluate_locally(case, arrays, gradients=names)
    assert unpack(result.loss).dtype == (np.float64 if dtype == "float64" else np.float32)
    assert {t.dtype for g in result.gradients for t in g.tensors} == {FLOATS[dtype]}
    assert same_bits(result.loss, evaluation.loss)
    assert gradients_match(result, evaluation)


@EVERY_CASE
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_in_the_type_asked_for(stub, rng, case, dtype):
    arrays = case.arrays(rng, 3)
    names = case.module.differentiable
    request = loss_request(case.config, [arrays], gradients=names, gradient_dtype=FLOATS[dtype])
    (result,) = stub.ComputeLoss(request).results
    wanted = getattr(torch, dtype)
    assert gradients_match(result, evaluate_locally(case, arrays, gradients=names, gradient_dtype=wanted))
    assert {t.dtype for g in result.gradients for t in g.tensors} == {FLOATS[dtype]}


@pytest.mark.parametrize(
    "names",
    [(), ("reg_preds",), ("centerness_preds", "cls_preds"), ("centerness_preds", "reg_preds", "cls_preds")],
)
def test_gradients_by_name_in_the_order_asked(stub, rng, names):
    case = CASES["fcos-dense"]
    arrays = case.arrays(rng, 2)
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays], gradients=names)).results
    assert tuple(gradient.input for gradient in result.gradients) == names
    everything = evaluate_locally(case, arrays, gradients=case.module.differentiable)
    for gradient in result.gradients:
        levels = everything.gradients[gradient.input]
        assert all(same_bits(t, e) for t, e in zip(gradient.tensors, levels, strict=True))


@pytest.mark.parametrize("name", ["fcos-dense", "fcos-truth"])
def test_component_gradients_leave_the_component_weight_out(stub, rng, name):
    case = CASES[name]
    arrays = case.arrays(rng, 2)
    names = case.module.differentiable
    plain, component = (
        stub.ComputeLoss(
            loss_request(case.config, [arrays], gradients=names, component_gradients=bare)
        ).results[0]
        for bare in (False, True)
    )
    weights = {c.name: c.weight for c in component.components}
    for term, whole, part in zip(
        ("cls_loss", "reg_loss", "centerness_loss"), plain.gradients, component.gradients, strict=True
    ):
        for of_loss, of_component in zip(whole.tensors, part.tensors, strict=True):
            np.testing.assert_allclose(
                unpack(of_loss), unpack(of_component) * weights[term], rtol=1e-5, atol=1e-12
            )
    assert gradients_match(
        component, evaluate_locally(case, arrays, gradients=names, component_gradients=True)
    )


@pytest.mark.parametrize("name", ["centerness", "centerness-sum", "fcos-dense", "fcos-truth"])
def test_loss_is_the_weighted_sum_of_its_components(stub, rng, name):
    case = CASES[name]
    (result,) = stub.ComputeLoss(loss_request(case.config, [case.arrays(rng, 4)])).results
    total = sum(c.weight * c.value for c in result.components)
    assert unpack(result.loss) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "total"), [("focal", "cls_loss"), ("giou", "reg_loss"), ("centerness", "centerness_loss")]
)
def test_normalizer_replaces_the_count(stub, rng, name, total):
    case = CASES[name]
    arrays = case.arrays(rng, 6)
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays], normalizer=17.5)).results
    (sums,) = result.raw_sums
    assert unpack(result.loss) == pytest.approx(getattr(sums, total) / 17.5, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "total", "count"),
    [
        ("focal", "cls_loss", "valid_count"),
        ("giou", "reg_loss", "weight"),
        ("centerness", "centerness_loss", "weight"),
    ],
)
def test_raw_sums_of_two_workers_finish_the_loss_of_both(stub, rng, name, total, count):
    case = CASES[name]
    whole = case.arrays(rng, 10)
    halves = [{k: v[part] for k, v in whole.items()} for part in (slice(0, 3), slice(3, None))]
    (together,) = stub.ComputeLoss(loss_request(case.config, [whole])).results
    sums = [r.raw_sums[0] for r in stub.ComputeLoss(loss_request(case.config, halves)).results]
    divided = sum(getattr(s, total) for s in sums) / sum(getattr(s, count) for s in sums)
    assert unpack(together.loss) == pytest.approx(divided, rel=1e-6)


def test_kept_rows_say_what_the_rows_are_of(stub, rng):
    arrays = focal_arrays(rng, 12)
    arrays["targets"][[0, 5]] = -1
    config = losses_pb2.FocalLoss(reduction=losses_pb2.REDUCTION_NONE)
    (result,) = stub.ComputeLoss(loss_request(config, [arrays])).results
    kept = unpack(result.kept_rows)
    assert kept.dtype == np.int64
    assert kept.tolist() == np.nonzero(arrays["targets"] >= 0)[0].tolist()
    assert unpack(result.loss).shape == kept.shape
    assert result.positive_count == len(kept)
    (mean,) = stub.ComputeLoss(loss_request(losses_pb2.FocalLoss(), [arrays])).results
    assert not mean.HasField("kept_rows")


def test_non_finite_inputs_are_reported(stub, rng):
    arrays = focal_arrays(rng, 4)
    arrays["inputs"][2, 1] = np.nan
    arrays["inputs"][3, 0] = -np.inf
    finite, stray = stub.ComputeLoss(
        loss_request(losses_pb2.FocalLoss(), [focal_arrays(rng, 4), arrays])
    ).results
    assert not finite.non_finite
    (found,) = stray.non_finite
    assert (found.input, found.count, list(found.first_index)) == ("inputs", 2, [2, 1])


def test_non_finite_level_is_named(stub, rng):
    case = CASES["fcos-dense"]
    arrays = case.arrays(rng, 1)
    arrays["reg_preds"][1][0, 3, 2, 4] = np.inf
    (result,) = stub.ComputeLoss(loss_request(case.config, [arrays])).results
    (found,) = result.non_finite
    assert (found.input, found.count, list(found.first_index)) == ("reg_preds[1]", 1, [0, 3, 2, 4])


def test_strict_takes_finite_inputs_of_any_size(stub, rng):
    arrays = giou_arrays(rng, 3)
    arrays["pred_boxes"] = np.full((3, 4), 3e38, np.float32)
    request = loss_request(losses_pb2.GIoULoss(), [arrays], strict=True)
    assert not stub.ComputeLoss(request).results[0].non_finite


@pytest.mark.parametrize(
    ("name", "asked", "used"),
    [
        ("fcos-dense", 0, losses_pb2.LOSS_PRESET_AUTOTIMM),
        ("fcos-truth", 0, losses_pb2.LOSS_PRESET_DOCUMENTED),
        ("fcos-truth", losses_pb2.LOSS_PRESET_AUTOTIMM, losses_pb2.LOSS_PRESET_AUTOTIMM),
        ("fcos-dense", losses_pb2.LOSS_PRESET_DOCUMENTED, losses_pb2.LOSS_PRESET_DOCUMENTED),
    ],
)
def test_preset_by_kind_of_targets(stub, rng, name, asked, used):
    config = losses_pb2.FCOSLoss(num_classes=CLASSES, preset=asked)
    (result,) = stub.ComputeLoss(loss_request(config, [CASES[name].arrays(rng, 1)])).results
    assert result.preset == used


def test_timings_are_set(stub, rng):
    case = CASES["fcos-dense"]
    timings = stub.ComputeLoss(loss_request(case.config, [case.arrays(rng, 2)])).timings
    assert timings.decode_us > 0
    assert timings.compute_us > 0
    assert timings.encode_us > 0
    assert timings.queue_us >= 0


def test_custom_loss_with_gradients(stub, rng):
    pred, target = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2))
    config = losses_pb2.CustomLoss(name="Squared")
    request = loss_request(config, [{"pred": pred, "target": target}], gradients=["target", "pred"])
    (result,) = stub.ComputeLoss(request).results
    tensors = [torch.tensor(array, requires_grad=True) for array in (pred, target)]
    loss = Squared()(*tensors)
    loss.backward()
    assert same_bits(result.loss, loss.detach())
    assert [g.input for g in result.gradients] == ["target", "pred"]
    assert same_bits(result.gradients[0].tensors[0], tensors[1].grad)
    assert same_bits(result.gradients[1].tensors[0], tensors[0].grad)
    assert result.preset == 0
    assert not result.raw_sums


def test_custom_loss_keeps_its_components_and_its_shape(stub):
    pred = np.array([[1.0, -2.0], [3.0, 0.0]], np.float32)
    (named,) = stub.ComputeLoss(loss_request(losses_pb2.CustomLoss(name="Named"), [{"pred": pred}])).results
    assert unpack(named.loss) == 6
    assert [(c.name, c.value, c.weight) for c in named.components] == [("l2", 14.0, 0.0)]
    (rows,) = stub.ComputeLoss(loss_request(losses_pb2.CustomLoss(name="Rows"), [{"pred": pred}])).results
    assert unpack(rows.loss).tolist() == [5.0, 9.0]


def test_server_info(stub):
    info = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert list(info.losses) == ["focal", "giou", "centerness", "fcos", "custom"]
    squared = next(loss for loss in info.custom_losses if loss.name == "Squared")
    assert list(squared.inputs) == ["pred", "target", "scale"]
    assert info.max_message_bytes == 256 << 20
    assert info.max_stream_count == 32
    assert info.devices
    assert info.uptime_seconds > 0


def test_a_loss_beyond_its_type_is_infinite(stub):
    arrays = focal_arrays(np.random.default_rng(0), 3)
    (result,) = stub.ComputeLoss(loss_request(losses_pb2.FocalLoss(), [arrays], normalizer=1e-300)).results
    assert np.isinf(unpack(result.loss))
