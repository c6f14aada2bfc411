"""Focal loss: value and gradient against the oracle, and the facts that a user of it relies on."""

import math

import numpy as np
import pytest
import torch

from lossd_server.losses import EvaluationOptions, FocalLoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

EXTREMES = [80.0, -80.0, 40.0, -40.0, 20.0, -20.0, 16.0, -16.0, 1.0, -1.0, 1e-6, 0.0]


def extreme_case():
    """Every extreme logit as the own class and as another one."""
    inputs = torch.tensor([[own, other] for own in EXTREMES for other in EXTREMES])
    return inputs, torch.tensor([0, 1, -1]).repeat(len(inputs) // 3)


def random_case(shape=(30, 4), dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    inputs = torch.tensor(rng.normal(0, 4, shape), dtype=dtype)
    targets = torch.tensor(rng.integers(-1, shape[1], (shape[0], *shape[2:])))
    return inputs, targets


def assert_as_oracle(module, inputs, targets, rtol=1e-6):
    inputs = inputs.detach().requires_grad_()
    value, gradient = oracle.focal_loss(
        oracle.numpy_of(inputs), targets, module.reduction, alpha=module.alpha, gamma=module.gamma
    )
    loss = module(inputs, targets)
    loss.sum().backward()
    oracle.assert_close(loss, value)
    assert inputs.grad.dtype == inputs.dtype
    oracle.assert_close(inputs.grad, gradient, rtol=rtol)


@pytest.mark.parametrize("gamma", oracle.GAMMAS)
@pytest.mark.parametrize("alpha", oracle.ALPHAS)
@pytest.mark.parametrize("case", [random_case(), extreme_case()], ids=["random", "extreme"])
def test_value_and_gradient_are_accurate_to_1e6(case, alpha, gamma):
    assert_as_oracle(FocalLoss(alpha=alpha, gamma=gamma, reduction="sum"), *case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(30, 4), (7, 1), (1, 5), (2, 3, 4, 5), (2, 1, 3, 3), (2, 3, 1, 1)])
def test_every_reduction_takes_rows_and_maps(shape, reduction):
    assert_as_oracle(FocalLoss(reduction=reduction), *random_case(shape))


LAYOUTS = {
    "transposed rows": lambda rng: torch.tensor(rng.normal(size=(4, 30)), dtype=torch.float32).t(),
    "sliced rows": lambda rng: torch.tensor(rng.normal(size=(60, 9)), dtype=torch.float32)[::2, 1::2],
    "expanded rows": lambda rng: torch.tensor(rng.normal(size=(30, 1)), dtype=torch.float32).expand(30, 4),
    "channels last": lambda rng: torch.tensor(rng.normal(size=(2, 3, 4, 5)), dtype=torch.float32).to(
        memory_format=torch.channels_last
    ),
    "transposed map": lambda rng: torch.tensor(rng.normal(size=(2, 3, 5, 4)), dtype=torch.float32).mT,
    "sliced map": lambda rng: torch.tensor(rng.normal(size=(2, 6, 8, 5)), dtype=torch.float32)[
        :, ::2, 1::2, :-1
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout):
    rng = np.random.default_rng(1)
    inputs = LAYOUTS[layout](rng)
    targets = torch.tensor(rng.integers(-1, inputs.shape[1], (2 * inputs.shape[0], *inputs.shape[2:])))[::2]
    assert_as_oracle(FocalLoss(reduction="none"), inputs, targets)


@pytest.mark.parametrize("case", [random_case((400, 80)), random_case((3, 90, 50, 40))], ids=["rows", "maps"])
def test_grids_larger_than_one_portion_are_covered_once(case):
    inputs, targets = case
    module = FocalLoss(reduction="sum")
    total = module(inputs, targets)
    one_by_one = sum(module(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(inputs)))
    oracle.assert_close(total, one_by_one.item(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", oracle.GAMMAS)
def test_half_precision_logits_are_computed_in_float32(dtype, gamma):
    inputs, targets = random_case(dtype=dtype)
    module = FocalLoss(gamma=gamma)
    value, gradient = oracle.focal_loss(oracle.numpy_of(inputs), targets, "mean", gamma=gamma)
    options = EvaluationOptions(gradients=("inputs",), gradient_dtype=torch.float32)
    evaluation = evaluated(module, {"inputs": inputs, "targets": targets}, options)
    assert evaluation.loss.dtype == torch.float32
    oracle.assert_close(evaluation.loss, value)
    oracle.assert_close(evaluation.gradients["inputs"], gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_once(dtype):
    inputs, targets = random_case(dtype=dtype)
    inputs.requires_grad_()
    FocalLoss(reduction="sum")(inputs, targets).backward()
    _, gradient = oracle.focal_loss(oracle.numpy_of(inputs), targets, "sum")
    info = torch.finfo(dtype)
    oracle.assert_close(inputs.grad, gradient, rtol=0.5001 * info.eps, atol=info.smallest_normal * info.eps)


def test_float64_logits_are_computed_in_float64():
    inputs, targets = random_case(dtype=torch.float64)
    loss = FocalLoss()(inputs, targets)
    assert loss.dtype == torch.float64
    oracle.assert_close(loss, oracle.focal_loss(inputs.numpy(), targets, "mean")[0], rtol=1e-13)


@pytest.mark.parametrize("x", [16.0, 20.0, 40.0, 80.0])
def test_easy_positive_keeps_its_digits(x):
    loss = FocalLoss(alpha=0.25, gamma=2.0)(torch.tensor([[x]]), torch.tensor([0]))
    miss = math.exp(-x) / (1 + math.exp(-x))
    oracle.assert_close(loss, 0.25 * miss**2 * math.log1p(math.exp(-x)))


@pytest.mark.parametrize("gamma", oracle.GAMMAS)
@pytest.mark.parametrize("x", [80.0, -80.0, 1e4, -1e4, 1e30, -1e30, float(np.finfo(np.float32).max)])
def test_finite_logits_give_finite_values_and_gradients(x, gamma):
    inputs = torch.tensor([[x, 0.0], [0.0, x]], requires_grad=True)
    loss = FocalLoss(gamma=gamma, reduction="none")(inputs, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert inputs.grad.isfinite().all()


def test_gamma_zero_is_alpha_weighted_bce():
    inputs, targets = random_case()
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), 4).double()
    alpha_t = 0.25 * one_hot + 0.75 * (1 - one_hot)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        inputs.double(), one_hot, weight=alpha_t, reduction="none"
    )
    expected = bce.sum(dim=1)[targets >= 0].mean()
    oracle.assert_close(FocalLoss(gamma=0.0)(inputs, targets), expected.item())


@pytest.mark.parametrize("alpha", [None, -1.0, -0.5])
def test_alpha_unset_or_negative_weighs_all_alike(alpha):
    inputs, targets = random_case()
    doubled = 2 * FocalLoss(alpha=0.5)(inputs, targets)
    oracle.assert_close(FocalLoss(alpha=alpha)(inputs, targets), doubled.item())


def test_mean_is_over_rows_that_are_not_ignored_after_a_sum_over_classes():
    inputs, targets = torch.zeros(4, 3), torch.tensor([0, -1, 2, -1])
    element = 0.25 * math.log(2)  # (1 - 0.5)² · log 2
    oracle.assert_close(FocalLoss()(inputs, targets), (0.25 + 2 * 0.75) * element)


def test_labels_start_at_zero():
    inputs = torch.tensor([[30.0, -30.0, -30.0]])
    assert FocalLoss()(inputs, torch.tensor([0])) < 1e-20
    assert FocalLoss()(inputs, torch.tensor([1])) > 1


NO_VALID_ROWS = {
    "no rows": (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    "no images": (torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)),
    "no cells": (torch.zeros(2, 3, 0, 4), torch.zeros(2, 0, 4, dtype=torch.int64)),
    "all ignored": (torch.ones(5, 3), torch.full((5,), -1)),
    "all ignored, inf": (torch.tensor([[math.inf, 0.0], [1.0, -math.inf]]), torch.tensor([-1, -1])),
    "all ignored, nan": (torch.full((2, 2), math.nan), torch.tensor([-1, -1])),
    "all ignored, fp16": (torch.full((200, 3), 60000.0, dtype=torch.float16), torch.full((200,), -1)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", NO_VALID_ROWS)
def test_without_valid_rows_value_and_gradient_are_exactly_zero(case, reduction):
    inputs, targets = NO_VALID_ROWS[case]
    inputs = inputs.clone().requires_grad_()
    loss = FocalLoss(reduction=reduction)(inputs, targets)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0
    assert inputs.grad.shape == inputs.shape
    assert not inputs.grad.any()


def test_without_classes_the_value_is_exactly_zero():
    inputs = torch.zeros(3, 0, requires_grad=True)
    loss = FocalLoss()(inputs, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0


def test_an_ignored_row_has_no_say_even_if_it_is_infinite():
    inputs = torch.tensor([[0.0, 1.0], [math.inf, math.nan]], requires_grad=True)
    loss = FocalLoss()(inputs, torch.tensor([0, -1]))
    loss.backward()
    oracle.assert_close(loss, oracle.focal_loss([[0.0, 1.0]], [0], "mean")[0])
    assert inputs.grad[1].tolist() == [0, 0]


def test_none_comes_with_the_rows_it_kept():
    targets = torch.tensor([[[1, -1], [-1, 0]], [[-1, -1], [2, -1]]])
    inputs = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    evaluation = evaluated(
        FocalLoss(reduction="none"), {"inputs": inputs, "targets": targets}, EvaluationOptions()
    )
    assert evaluation.kept_rows.tolist() == [0, 3, 6]
    rows, _ = oracle.focal(inputs, targets)
    oracle.assert_close(evaluation.loss, rows.flatten()[[0, 3, 6]])


def test_none_passes_each_rows_upstream_gradient_to_that_row():
    inputs, targets = random_case((2, 3, 4, 5))
    inputs.requires_grad_()
    loss = FocalLoss(reduction="none")(inputs, targets)
    upstream = torch.arange(1.0, len(loss) + 1)
    loss.backward(upstream)
    factors = np.zeros(targets.shape)
    factors[targets.numpy() >= 0] = upstream
    _, slopes = oracle.focal(oracle.numpy_of(inputs), targets)
    oracle.assert_close(inputs.grad, slopes * factors[:, None])


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"gamma": 1.5}], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ],
)
def test_labels_of_every_integer_type_are_taken(dtype, settings, wide):
    inputs, targets = random_case(dtype=torch.float64 if wide else torch.float32)
    targets = targets.abs()
    expected = FocalLoss(**settings)(inputs, targets)
    assert FocalLoss(**settings)(inputs, targets.to(dtype)).equal(expected)
