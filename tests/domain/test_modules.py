"""What all loss modules share: evaluation and autograd agree, loss scales survive, no waits on a device."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossd_server.errors import InvalidInputError
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss
from lossd_server.losses.evaluation import find_non_finite
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

REDUCTIONS = ("mean", "sum", "none")


def leaf(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def boxes(rng, n):
    corner = rng.uniform(0, 30, (n, 2))
    return np.hstack([corner, corner + rng.uniform(5, 30, (n, 2))])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", oracle.GAMMAS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_focal_gradient_is_that_of_its_value(shape, gamma, reduction):
    rng = np.random.default_rng(0)
    targets = torch.tensor(rng.integers(-1, 3, (shape[0], *shape[2:])))
    module = FocalLoss(gamma=gamma, reduction=reduction)
    assert torch.autograd.gradcheck(lambda x: module(x, targets), leaf(rng.normal(size=shape)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.0, 1.0])])
def test_giou_gradient_is_that_of_its_value(weights, reduction):
    rng = np.random.default_rng(1)
    target, module = torch.tensor(boxes(rng, 4)), GIoULoss(reduction)
    assert torch.autograd.gradcheck(lambda x: module(x, target, weights), leaf(boxes(rng, 4)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.0, 1.0])])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2)])
def test_centerness_gradient_is_that_of_its_value(shape, weights, reduction):
    rng = np.random.default_rng(2)
    target, module = torch.tensor(rng.uniform(size=shape)), CenternessLoss(reduction)
    weights = None if weights is None else weights.reshape(shape)
    assert torch.autograd.gradcheck(lambda x: module(x, target, weights), leaf(rng.normal(size=shape)))


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_fcos_gradients_are_those_of_its_values(preset):
    rng = np.random.default_rng(3)
    sizes = [(2, 2), (1, 2)]
    preds = oracle.head(rng, sizes, batch=1, classes=2, dtype=torch.float64)
    targets = oracle.dense_targets(rng, sizes, batch=1, classes=2, dtype=torch.float64)
    module = FCOSLoss(2, 0.25, 2.0, 0.5, 2.0, 3.0, preset=preset)

    def losses(*levels):
        return tuple(module(levels[:2], levels[2:4], levels[4:], *targets).values())

    assert torch.autograd.gradcheck(losses, tuple(level for term in preds for level in term))


SCALE = 65536.0
SCALED = {
    "focal": (lambda x: FocalLoss()(x, torch.tensor([0])), [[6.0, -6.0]]),
    "giou": (
        lambda x: GIoULoss()(x, torch.tensor([[0.0, 0.0, 60000.0, 60000.0]])),
        [[0.0, 0.0, 60000.0, 49984.0]],
    ),
    "centerness": (lambda x: CenternessLoss()(x, torch.tensor([1.0])), [17.5]),
}


@pytest.mark.parametrize("loss", SCALED)
def test_half_precision_gradients_survive_a_loss_scale(loss):
    """They are so small that float16 would lose digits, or all of them, before the scale."""
    compute, values = SCALED[loss]
    wide, half = leaf(values), leaf(values, torch.float16)
    compute(wide).backward()
    (compute(half) * SCALE).backward()
    assert not torch.equal(half.grad, torch.zeros_like(half))
    oracle.assert_close(half.grad, oracle.numpy_of(wide.grad * SCALE), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_half_precision_heads_survive_a_loss_scale(preset):
    rng, sizes = np.random.default_rng(4), [(3, 3)]
    half = oracle.head(rng, sizes, dtype=torch.float16)
    wide = [[level.detach().double().requires_grad_() for level in term] for term in half]
    targets = oracle.dense_targets(rng, sizes)
    for preds in (half, wide):
        (FCOSLoss(3, preset=preset)(*preds, *targets)["loss"] * 4096).backward()
    for (of_half,), (of_wide,) in zip(half, wide, strict=True):
        oracle.assert_close(of_half.grad, oracle.numpy_of(of_wide.grad), rtol=1e-3, atol=1e-7)


MODULES = {
    "focal": (FocalLoss(), {"inputs": torch.zeros(2, 3), "targets": torch.tensor([0, 1])}),
    "giou": (GIoULoss(), {"pred_boxes": torch.ones(2, 4), "target_boxes": torch.zeros(2, 4)}),
    "centerness": (CenternessLoss(), {"pred": torch.zeros(2), "target": torch.ones(2)}),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_computed_only_when_wanted(name):
    module, arguments = MODULES[name]
    assert not evaluated(module, arguments, EvaluationOptions()).gradients
    assert not module(**arguments).requires_grad
    (prediction,) = module.differentiable
    arguments = {**arguments, prediction: arguments[prediction].clone().requires_grad_()}
    assert module(**arguments).requires_grad
    with torch.no_grad():
        assert not module(**arguments).requires_grad


def test_only_the_predictions_that_require_it_get_a_gradient():
    rng, sizes = np.random.default_rng(5), [(2, 2), (1, 1)]
    preds, targets = oracle.head(rng, sizes, requires_grad=False), oracle.dense_targets(rng, sizes)
    preds[2][1].requires_grad_()
    FCOSLoss(3)(*preds, *targets)["loss"].backward()
    assert preds[2][1].grad is not None
    assert all(level.grad is None for level in [*preds[0], *preds[1], preds[2][0]])


TARGETS = {"giou": "target_boxes", "centerness": "target"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_requires_a_gradient_is_refused(name):
    module, arguments = MODULES[name]
    target = arguments[TARGETS[name]].clone().requires_grad_()
    with pytest.raises(InvalidInputError, match=f"{TARGETS[name]}: requires a gradient"):
        module(**{**arguments, TARGETS[name]: target})


@pytest.mark.parametrize("name", MODULES)
def test_inputs_are_left_as_they_were(name):
    module, arguments = MODULES[name]
    before = {key: tensor.clone() for key, tensor in arguments.items()}
    evaluated(module, arguments, EvaluationOptions(gradients=module.differentiable))
    assert all(arguments[key].equal(tensor) for key, tensor in before.items())


def test_non_finite_inputs_are_reported_with_count_and_first_index():
    inf, nan = float("inf"), float("nan")
    found = find_non_finite(
        {
            "inputs": torch.tensor([[0.0, 1.0], [inf, nan]]),
            "targets": torch.tensor([0, 1]),
            "levels": [torch.zeros(2), torch.tensor([1.0, -inf])],
            "large": torch.full((9,), 3e38),
            "none": None,
        }
    )
    assert [(report.input, report.count, report.first_index) for report in found] == [
        ("inputs", 2, (1, 0)),
        ("levels[1]", 1, (1,)),
    ]


WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
}


class WaitCounter(TorchDispatchMode):
    """Counts the operators that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 else None
        masks = isinstance(indices, list | tuple) and any(
            isinstance(index, torch.Tensor) and index.dtype in {torch.bool, torch.uint8} for index in indices
        )
        if name in WAITS or masks:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def waits(preset, levels):
    rng, sizes = np.random.default_rng(6), [(6, 5), (4, 4), (3, 3), (2, 2), (1, 1)][:levels]
    preds, targets = oracle.head(rng, sizes), oracle.dense_targets(rng, sizes)
    with WaitCounter() as counter:
        loss = FCOSLoss(3, preset=preset)(*preds, *targets)["loss"]
        loss.backward()
    return counter.counts


def test_the_counter_counts():
    with WaitCounter() as counter:
        mask = torch.tensor([True, False])
        mask[mask].any().item()
        mask.nonzero()
    assert {"index", "_local_scalar_dense", "nonzero"} <= set(counter.counts)


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_the_host_never_waits_once_a_level(preset):
    assert waits(preset, 5) == waits(preset, 1)
