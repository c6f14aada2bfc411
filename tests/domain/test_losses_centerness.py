"""Centerness loss: the oracle, its entropy floor, shapes and types."""

import math

import numpy as np
import pytest
import torch

from lossd_server.losses import CenternessLoss, EvaluationOptions
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

EXTREMES = [80.0, -80.0, 40.0, -40.0, 16.0, -16.0, 0.5, 0.0]
TARGETS = [0.0, 1.0, 0.5, 0.25, 1e-6]


def case(dtype=torch.float32):
    rng = np.random.default_rng(5)
    pairs = [(x, t) for x in EXTREMES for t in TARGETS]
    pairs += zip(rng.normal(0, 3, 20), rng.uniform(0, 1, 20), strict=True)
    pred, target = torch.tensor(np.array(pairs), dtype=dtype).unbind(1)
    return pred.contiguous(), target.contiguous()


def expected_rows(pred, target):
    rows = [oracle.bce(*pair) for pair in zip(oracle.numpy_of(pred), oracle.numpy_of(target), strict=True)]
    return np.array(rows).T


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_oracle(dtype, weighted, reduction):
    pred, target = case(dtype)
    weights = torch.rand(len(pred), generator=torch.Generator().manual_seed(0)) if weighted else None
    values, slopes = expected_rows(pred, target)
    factors = oracle.numpy_of(weights) if weighted else np.ones(len(pred))
    if reduction == "mean":
        factors = factors / factors.sum()
    arguments = {"pred": pred, "target": target, "weights": weights}
    options = EvaluationOptions(gradients=("pred",), gradient_dtype=torch.float32)
    evaluation = evaluated(CenternessLoss(reduction), arguments, options)
    oracle.assert_close(
        evaluation.loss, values * factors if reduction == "none" else (values * factors).sum()
    )
    oracle.assert_close(evaluation.gradients["pred"], slopes * factors)


SHAPES = [((6,), (6,)), ((6, 1), (6,)), ((6,), (6, 1)), ((2, 1, 3, 1), (2, 1, 3, 1)), ((2, 1, 3), (2, 3))]


@pytest.mark.parametrize(("pred_shape", "target_shape"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_has_the_shape_of_the_logits(pred_shape, target_shape, reduction):
    pred, target = (torch.linspace(-2, 2, 6), torch.linspace(0, 1, 6))
    shaped = pred.reshape(pred_shape).requires_grad_()
    loss = CenternessLoss(reduction)(shaped, target.reshape(target_shape))
    loss.sum().backward()
    values, slopes = expected_rows(pred, target)
    oracle.assert_close(loss, values if reduction == "none" else values.mean())
    scale = 1 if reduction == "none" else 1 / 6
    oracle.assert_close(shaped.grad, (slopes * scale).reshape(pred_shape))


def test_strides_do_not_matter():
    pred, target = case()
    both = torch.stack([pred, target]).reshape(2, 5, -1)
    strided = torch.stack([both[0], both[0]], dim=2)[:, :, 0].t().requires_grad_()
    assert not strided.is_contiguous()
    loss = CenternessLoss("none")(strided, both[1].t())
    loss.sum().backward()
    values, slopes = expected_rows(pred, target)
    oracle.assert_close(loss, values.reshape(5, -1).T.ravel())
    oracle.assert_close(strided.grad, slopes.reshape(5, -1).T)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_perfect_prediction_is_worth_the_entropy_of_its_target(target):
    pred = torch.tensor([math.log(target / (1 - target)) if 0 < target < 1 else 100 * (2 * target - 1)])
    evaluation = evaluated(
        CenternessLoss(),
        {"pred": pred, "target": torch.tensor([target])},
        EvaluationOptions(gradients=("pred",)),
    )
    values = {component.name: component.value.item() for component in evaluation.components}
    assert values["centerness_floor"] == pytest.approx(oracle.entropy(target), rel=1e-6, abs=1e-12)
    assert values["centerness_loss"] == pytest.approx(values["centerness_floor"], rel=1e-6, abs=1e-12)
    assert evaluation.gradients["pred"].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_the_floor_is_reduced_and_weighted_like_the_loss_and_adds_nothing_to_it(weights, reduction):
    targets = [0.5, 0.2, 0.9]
    evaluation = evaluated(
        CenternessLoss(reduction),
        {
            "pred": torch.zeros(3),
            "target": torch.tensor(targets),
            "weights": None if weights is None else torch.tensor(weights),
        },
        EvaluationOptions(),
    )
    factors = np.array(weights or [1.0, 1.0, 1.0])
    floor = (factors * [oracle.entropy(t) for t in targets]).sum()
    if reduction == "mean":
        floor /= factors.sum()
    loss, reported = evaluation.components
    assert (loss.weight, reported.name, reported.weight) == (1, "centerness_floor", 0)
    oracle.assert_close(reported.value, floor)
    assert reported.value < loss.value


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (0, 1)])
def test_no_rows_give_exactly_zero_and_an_empty_gradient(shape, reduction):
    pred = torch.zeros(shape, requires_grad=True)
    loss = CenternessLoss(reduction)(pred, torch.zeros(0), torch.zeros(0))
    loss.backward()
    assert (loss.shape, loss.item()) == ((), 0)
    assert pred.grad.shape == shape


def test_one_row_without_a_dimension_is_a_row():
    pred = torch.tensor(0.0, requires_grad=True)
    loss = CenternessLoss("none")(pred, torch.tensor(1.0))
    loss.sum().backward()
    oracle.assert_close(loss, [math.log(2)])
    assert pred.grad.item() == -0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_target_and_weights_may_have_a_type_of_their_own(dtype):
    pred = torch.tensor([0.0, 0.0])
    loss = CenternessLoss()(
        pred, torch.tensor([0.5, 1.0], dtype=dtype), torch.tensor([1.0, 3.0], dtype=dtype)
    )
    assert loss.dtype == torch.float32
    oracle.assert_close(loss, math.log(2))
