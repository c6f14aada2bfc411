"""`RemoteLoss`: a remote loss trains like the local module, bit for bit, in one round trip."""

import numpy as np
import pytest
import torch

from lossd_client import CustomLoss, FCOSLoss, FocalLoss, InvalidInputError
from lossd_client.torch import RemoteLoss
from lossd_server import losses as local
from tests.client.support import FCOS, SIMPLE, counting_client
from tests.service.custom_modules import Squared
from tests.service.support import CLASSES, fcos_dense_arrays

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TERMS = ("cls_loss", "reg_loss", "centerness_loss", "loss", "total_loss")


def tensors(case, dtype=torch.float32, seed=0):
    """The arguments as tensors, those of predictions as leaves that require a gradient."""

    def leaf(value, name):
        if isinstance(value, list):
            return [leaf(entry, name) for entry in value]
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(value.copy())
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor.requires_grad_(name in case.config.differentiable)

    values = zip(case.names, case.arguments(seed, n=3), strict=True)
    return [leaf(value, name) for name, value in values]


def leaves(arguments):
    flat = [entry for value in arguments for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in flat if isinstance(entry, torch.Tensor) and entry.requires_grad]


def same_gradients(arguments, others) -> bool:
    pairs = list(zip(leaves(arguments), leaves(others), strict=True))
    return bool(pairs) and all(
        a.grad is not None and a.grad.dtype == b.grad.dtype and torch.equal(a.grad, b.grad) for a, b in pairs
    )


def same_tensor(value, expected) -> bool:
    return (value.dtype, value.shape) == (expected.dtype, expected.shape) and torch.equal(value, expected)


@pytest.mark.parametrize("case", SIMPLE.values(), ids=SIMPLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simple_losses(client, case, dtype):
    here, there = tensors(case, dtype), tensors(case, dtype)
    expected, loss = case.module(*here), RemoteLoss(client, case.config)(*there)
    assert same_tensor(loss.detach(), expected.detach())
    upstream = torch.linspace(-2, 3, max(expected.numel(), 1)).to(expected.dtype).reshape(expected.shape)
    expected.backward(upstream)
    loss.backward(upstream)
    assert same_gradients(there, here)


COMBINATIONS = {
    "loss": lambda out: out["loss"],
    "total_loss": lambda out: out["total_loss"] * 0.5,
    "one-term": lambda out: out["reg_loss"],
    "terms": lambda out: out["cls_loss"] + 2 * out["reg_loss"] + 0.1 * out["centerness_loss"],
    "loss-and-term": lambda out: out["loss"] * 3 + out["reg_loss"],
    "square": lambda out: out["loss"] ** 2,
}


@pytest.mark.parametrize("case", FCOS.values(), ids=FCOS)
@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_fcos_losses(client, case, combine):
    here, there = tensors(case), tensors(case)
    expected, losses = case.module(*here), RemoteLoss(client, case.config)(*there)
    assert tuple(losses) == tuple(expected) == TERMS
    assert all(same_tensor(losses[term].detach(), expected[term].detach()) for term in TERMS)
    combine(expected).backward()
    combine(losses).backward()
    given = [[leaf for leaf in leaves(arguments) if leaf.grad is not None] for arguments in (there, here)]
    assert same_gradients(*given)


@pytest.mark.parametrize("case", FCOS.values(), ids=FCOS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fcos_losses_in_every_type_with_a_loss_scale(client, case, dtype):
    here, there = tensors(case, dtype), tensors(case, dtype)
    expected, losses = case.module(*here), RemoteLoss(client, case.config)(*there)
    assert all(same_tensor(losses[term].detach(), expected[term].detach()) for term in TERMS)
    (expected["loss"] * 1024).backward()
    (losses["loss"] * 1024).backward()
    assert same_gradients(there, here)


def test_a_loss_scale_saves_small_half_precision_gradients(client):
    logits = torch.full((1000, 4), -6.0, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1000, dtype=torch.int64)
    loss = RemoteLoss(client, FocalLoss())(logits, labels)
    (loss * 65536.0).backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("documented", [False, True])
def test_both_sets_of_weight_names(client, documented):
    names = {f"{name}_loss_weight" if documented else f"{name}_weight": i + 2.0
             for i, name in enumerate(("cls", "reg", "centerness"))}  # fmt: skip
    arguments = list(fcos_dense_arrays(np.random.default_rng(0), 1).values())
    tensor_lists = [[torch.from_numpy(level) for level in levels] for levels in arguments]
    remote = RemoteLoss(client, FCOSLoss(num_classes=CLASSES, **names))(*tensor_lists)
    here = local.FCOSLoss(CLASSES, **names)(*tensor_lists)
    assert all(torch.equal(remote[term], here[term]) for term in TERMS)


def step_of(target, case, **which):
    """The requests that one training step makes."""
    with counting_client(target) as (client, calls):
        arguments = tensors(case)
        if which.get("detached"):
            for leaf in leaves(arguments):
                leaf.requires_grad_(requires_grad=False)
        result = RemoteLoss(client, case.config)(*arguments)
        loss = result["loss"] if isinstance(result, dict) else result.sum()
        if loss.requires_grad:
            loss.backward()
        return dict(calls), loss


@pytest.mark.parametrize("case", [SIMPLE["focal-mean"], FCOS["fcos-dense-default"]])
def test_a_step_is_one_round_trip(target, case):
    assert step_of(target, case)[0] == {"ComputeLoss": 1}


@pytest.mark.parametrize("case", [SIMPLE["giou-none"], FCOS["fcos-truth-documented"]])
def test_without_gradients_none_are_asked_for(target, case, monkeypatch):
    from lossd_client import Client

    asked = []
    compute = Client.compute_loss

    def spy(self, *arguments, gradients=False, **settings):
        asked.append(list(gradients))
        return compute(self, *arguments, gradients=gradients, **settings)

    monkeypatch.setattr(Client, "compute_loss", spy)
    with torch.no_grad():
        assert not step_of(target, case)[1].requires_grad
    assert not step_of(target, case, detached=True)[1].requires_grad
    assert asked == [[], []]
    assert step_of(target, case)[1].requires_grad
    assert asked[-1] == list(case.config.differentiable)


def test_only_some_predictions_require_a_gradient(client):
    case = FCOS["fcos-dense-default"]
    here, there = tensors(case), tensors(case)
    for arguments in (here, there):
        arguments[0][1].requires_grad_(requires_grad=False)
        for leaf in arguments[2]:
            leaf.requires_grad_(requires_grad=False)
    case.module(*here)["loss"].backward()
    RemoteLoss(client, case.config)(*there)["loss"].backward()
    assert same_gradients(there, here)
    assert there[0][1].grad is None


def test_inside_a_larger_graph(client):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 5)
    features, labels = torch.randn(6, 8), torch.tensor([0, 1, -1, 4, 3, 2])
    remote = RemoteLoss(client, FocalLoss())
    gradients = []
    for loss in (local.FocalLoss(), remote):
        head.zero_grad()
        loss(head(features), labels).backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    assert all(map(torch.equal, *gradients))
    assert list(remote.parameters()) == []


def test_gradient_descent_falls(client):
    case = FCOS["fcos-truth-documented"]
    arguments = tensors(case)
    remote = RemoteLoss(client, case.config)
    optimizer = torch.optim.SGD(leaves(arguments), lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = remote(*arguments)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_backward_twice_and_not_differentiable_again(client):
    case = SIMPLE["focal-mean"]
    arguments = tensors(case)
    loss = RemoteLoss(client, case.config)(*arguments)
    loss.backward(retain_graph=True)
    once = arguments[0].grad.clone()
    loss.backward()
    assert torch.equal(arguments[0].grad, 2 * once)
    other = RemoteLoss(client, case.config)(*arguments)
    (gradient,) = torch.autograd.grad(other**2, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()


def test_changing_the_input_between_forward_and_backward_changes_nothing(client):
    case = SIMPLE["giou-mean"]
    here, there = tensors(case), tensors(case)
    case.module(*here).backward()
    loss = RemoteLoss(client, case.config)(*there)
    with torch.no_grad():
        there[0].zero_()
    loss.backward()
    assert same_gradients(there, here)


def test_empty_batches(client):
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = RemoteLoss(client, FocalLoss())(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 4)
    ignored = torch.randn(3, 4, requires_grad=True)
    loss = RemoteLoss(client, FocalLoss(reduction="none"))(ignored, torch.full((3,), -1))
    loss.sum().backward()
    assert (ignored.grad == 0).all()


def test_custom_loss(client):
    values = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    here, there = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    Squared()(*here).mul(4).backward()  # exact in every order of multiplication
    loss = RemoteLoss(client, CustomLoss("Squared"))({"pred": there[0], "target": there[1]})
    loss.mul(4).backward()
    assert same_gradients(there, here)


def test_custom_loss_without_gradients(client):
    pred = torch.tensor([1.0, -3.0])
    loss = RemoteLoss(client, CustomLoss("Named"))({"pred": pred})
    assert loss.item() == 4
    assert not loss.requires_grad


def test_errors_pass_through(client):
    with pytest.raises(InvalidInputError) as caught:
        RemoteLoss(client, FocalLoss())(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 3]))
    assert caught.value.reason == "LABEL_OUT_OF_RANGE"
