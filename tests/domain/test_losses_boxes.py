"""GIoU loss: geometric facts, the oracle, weights and wide types."""

import math

import numpy as np
import pytest
import torch

from lossd_server.losses import EvaluationOptions, GIoULoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

UNIT = [0.0, 0.0, 10.0, 10.0]

FACTS = {
    "same box": (UNIT, 0.0),
    "quarter-size box inside": ([0.0, 0.0, 5.0, 5.0], 0.75),
    "touching along an edge": ([10.0, 0.0, 20.0, 10.0], 1.0),
    "touching at a corner": ([10.0, 10.0, 20.0, 20.0], 1.5),
    "as far again": ([20.0, 0.0, 30.0, 10.0], 1 + 1 / 3),
}


def random_boxes(rng, n, dtype=torch.float32):
    corner = rng.uniform(0, 100, (n, 2))
    return torch.tensor(np.hstack([corner, corner + rng.uniform(5, 80, (n, 2))]), dtype=dtype)


def expected_rows(pred, target):
    pairs = list(zip(oracle.numpy_of(pred).tolist(), oracle.numpy_of(target).tolist(), strict=True))
    rows = [oracle.giou_loss(*pair) for pair in pairs]
    return np.array(rows), np.array([oracle.slope_of(oracle.giou_loss, *pair) for pair in pairs])


@pytest.mark.parametrize("fact", FACTS)
def test_geometric_facts(fact):
    box, expected = FACTS[fact]
    oracle.assert_close(GIoULoss()(torch.tensor([box]), torch.tensor([UNIT])), expected, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_oracle(dtype, weighted, reduction):
    rng = np.random.default_rng(2)
    pred, target = random_boxes(rng, 40, dtype), random_boxes(rng, 40, dtype)
    smooth = (pred != target).all(dim=1)  # equal sides are a kink, where differences are no derivative
    pred, target = pred[smooth], target[smooth]
    weights = torch.tensor(rng.uniform(0, 2, len(pred)), dtype=dtype) if weighted else None
    rows, slopes = expected_rows(pred, target)
    factors = oracle.numpy_of(weights) if weighted else np.ones(len(pred))
    if reduction == "mean":
        factors = factors / factors.sum()
    arguments = {"pred_boxes": pred, "target_boxes": target, "weights": weights}
    options = EvaluationOptions(gradients=("pred_boxes",), gradient_dtype=torch.float64)
    evaluation = evaluated(GIoULoss(reduction), arguments, options)
    value = rows * factors if reduction == "none" else (rows * factors).sum()
    oracle.assert_close(evaluation.loss, value)
    oracle.assert_close(evaluation.gradients["pred_boxes"], slopes * factors[:, None], atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_forward_attaches_the_gradient_that_evaluate_gives(reduction):
    rng = np.random.default_rng(3)
    pred, target = random_boxes(rng, 9).requires_grad_(), random_boxes(rng, 9)
    module = GIoULoss(reduction)
    loss = module(pred, target)
    upstream = torch.rand(loss.shape)
    loss.backward(upstream)
    evaluation = evaluated(
        module,
        {"pred_boxes": pred.detach(), "target_boxes": target},
        EvaluationOptions(gradients=("pred_boxes",)),
    )
    factor = upstream.unsqueeze(-1) if reduction == "none" else upstream
    assert loss.equal(evaluation.loss)
    oracle.assert_close(pred.grad, oracle.numpy_of(evaluation.gradients["pred_boxes"] * factor))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_boxes_give_exactly_zero_and_an_empty_gradient(weighted, reduction):
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = GIoULoss(reduction)(pred, torch.zeros(0, 4), torch.zeros(0) if weighted else None)
    loss.backward()
    assert (loss.shape, loss.item()) == ((), 0)
    assert pred.grad.shape == (0, 4)


def test_weights_that_are_all_zero_give_zero():
    pred = torch.tensor([[0.0, 0.0, 5.0, 5.0]], requires_grad=True)
    loss = GIoULoss()(pred, torch.tensor([UNIT]), torch.zeros(1))
    loss.backward()
    assert loss.item() == 0
    assert not pred.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_half_precision_boxes_of_300_pixels_do_not_overflow(reduction):
    pred = torch.tensor([[0, 0, 300, 300]], dtype=torch.float16, requires_grad=True)
    target = torch.tensor([[0, 0, 600, 600]], dtype=torch.float16)
    loss = GIoULoss(reduction)(pred, target)
    loss.sum().backward()
    oracle.assert_close(loss.sum(), 0.75)
    assert pred.grad.isfinite().all()
    assert pred.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.uint8, torch.float16])
def test_target_boxes_of_any_type_are_taken(dtype):
    pred, target = torch.tensor([[0.0, 0.0, 5.0, 5.0]]), torch.tensor([UNIT]).to(dtype)
    oracle.assert_close(GIoULoss()(pred, target), 0.75)


def test_strides_do_not_matter():
    rng = np.random.default_rng(4)
    pred, target = random_boxes(rng, 12), random_boxes(rng, 12)
    strided = pred.t().contiguous().t().requires_grad_()
    loss = GIoULoss()(strided, target.repeat_interleave(2, dim=0)[::2])
    loss.backward()
    rows, slopes = expected_rows(pred, target)
    oracle.assert_close(loss, rows.mean())
    oracle.assert_close(strided.grad, slopes / 12, atol=1e-10)


INVERTED_PREDICTIONS = [[10.0, 0.0, 0.0, 10.0], [10.0, 10.0, 0.0, 0.0], [0.0, 30.0, 10.0, 20.0]]


@pytest.mark.parametrize("box", INVERTED_PREDICTIONS)
def test_inverted_predictions_follow_the_formula(box):
    loss = GIoULoss()(torch.tensor([box]), torch.tensor([UNIT]))
    oracle.assert_close(loss, oracle.giou_loss(box, UNIT))


def test_two_empty_boxes_at_one_point_are_worth_one():
    point = torch.full((1, 4), 7.0, requires_grad=True)
    loss = GIoULoss()(point, torch.full((1, 4), 7.0))
    loss.backward()
    assert loss.item() == 1
    assert point.grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 1.0])
def test_eps_floors_the_areas(eps):
    pred, target = [0.0, 0.0, 0.01, 0.02], [0.0, 0.0, 0.02, 0.02]
    loss = GIoULoss(eps=eps)(torch.tensor([pred]).double(), torch.tensor([target]).double())
    rounded = torch.tensor([pred, target]).double().tolist()
    oracle.assert_close(loss, oracle.giou_loss(*rounded, eps))


def test_large_coordinates_keep_their_digits():
    pred, target = (
        torch.tensor([[1e6, 1e6, 1e6 + 10, 1e6 + 10]]),
        torch.tensor([[1e6, 1e6, 1e6 + 5, 1e6 + 5]]),
    )
    oracle.assert_close(GIoULoss()(pred, target), 0.75)


def test_nan_is_not_swallowed():
    assert math.isnan(GIoULoss()(torch.tensor([[math.nan, 0.0, 5.0, 5.0]]), torch.tensor([UNIT])))
