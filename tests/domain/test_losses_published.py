"""The same numbers as the published source, which is run from the specification where that is at hand.

None of it is kept in this repository: `LOSSD_SHARED` names the folder that holds `spec/losses.txt`, by
default `../shared` beside the repository.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lossd_server.losses as ours
from tests.domain import oracle_losses as oracle

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = Path(os.environ.get("LOSSD_SHARED", REPOSITORY.parent / "shared")) / "spec" / "losses.txt"
CLASS = re.compile(r"^class \w+\(nn\.Module\):\n(?:(?: {4}.*)?\n)+", re.MULTILINE)

DTYPES = {torch.float32: 2e-5, torch.float64: 1e-9}
SIZES = [(6, 5), (3, 3), (2, 1)]


@pytest.fixture(scope="module")
def published():
    """The classes of the reference page, by name."""
    if not PAGE.is_file():
        pytest.skip(f"{PAGE} is not here: set LOSSD_SHARED to the folder that holds spec/losses.txt")
    names = {"torch": torch, "nn": nn, "F": nn.functional}
    # Its float32 one-hot targets round a float64 cross-entropy to float32, which would hide ours.
    page = PAGE.read_text(encoding="utf-8").replace("num_classes).float()", "num_classes).to(inputs.dtype)")
    for source in CLASS.findall(page):
        exec(source, names)  # noqa: S102  # the specification's own text, not anybody's input
    return names


def assert_same(mine, theirs, leaves, rtol):
    """Compares two losses, and their gradients in the same leaves."""
    values, gradients = [], []
    for loss in (mine, theirs):
        value = loss()
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
        gradients.append(torch.autograd.grad(value, leaves, upstream, materialize_grads=True))
        values.append(value)
    assert values[0].shape == values[1].shape
    for actual, expected in zip((values[0], *gradients[0]), (values[1], *gradients[1]), strict=True):
        floor = rtol * expected.abs().max().item() if expected.numel() else 0
        assert actual.dtype == expected.dtype
        oracle.assert_close(actual, oracle.numpy_of(expected), rtol=rtol, atol=floor)


def leaf(values, dtype):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def boxes(rng, n):
    corner = rng.uniform(0, 100, (n, 2))
    return np.hstack([corner, corner + rng.uniform(5, 80, (n, 2))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.0), (0.75, 3.0), (0.25, 0.0)])
@pytest.mark.parametrize("shape", [(20, 5), (2, 3, 4, 5), (0, 4)])
def test_focal_loss(published, shape, alpha, gamma, reduction, dtype):
    rng = np.random.default_rng(0)
    inputs = leaf(rng.uniform(-3, 3, shape), dtype)
    targets = torch.tensor(rng.integers(-1, shape[1], (shape[0], *shape[2:])))
    losses = (module(alpha, gamma, reduction) for module in (ours.FocalLoss, published["FocalLoss"]))
    assert_same(*(lambda loss=loss: loss(inputs, targets) for loss in losses), [inputs], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_focal_loss_with_every_row_ignored(published, reduction, dtype):
    inputs, targets = leaf(np.ones((4, 3)), dtype), torch.full((4,), -1)
    losses = (module(reduction=reduction) for module in (ours.FocalLoss, published["FocalLoss"]))
    assert_same(*(lambda loss=loss: loss(inputs, targets) for loss in losses), [inputs], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [30, 1, 0])
def test_giou_loss(published, n, weighted, reduction, dtype):
    rng = np.random.default_rng(1)
    pred, target = leaf(boxes(rng, n), dtype), torch.tensor(boxes(rng, n), dtype=dtype)
    weights = torch.tensor(rng.uniform(size=n), dtype=dtype) if weighted else None
    losses = (module(reduction) for module in (ours.GIoULoss, published["GIoULoss"]))
    assert_same(*(lambda loss=loss: loss(pred, target, weights) for loss in losses), [pred], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(30,), (30, 1), (2, 1, 3, 4), (0,)])
def test_centerness_loss(published, shape, weighted, reduction, dtype):
    rng = np.random.default_rng(2)
    pred, target = leaf(rng.normal(0, 2, shape), dtype), torch.tensor(rng.uniform(size=shape), dtype=dtype)
    weights = torch.tensor(rng.uniform(size=shape), dtype=dtype) if weighted else None
    losses = (module(reduction) for module in (ours.CenternessLoss, published["CenternessLoss"]))
    assert_same(*(lambda loss=loss: loss(pred, target, weights) for loss in losses), [pred], DTYPES[dtype])


def without_positives_on(level, targets):
    targets[0][level].fill_(-1)
    return targets


FCOS_TARGETS = {
    "positives on every level": lambda targets: targets,
    "a level without positives": lambda targets: without_positives_on(1, targets),
    "no positives": lambda targets: [[torch.full_like(t, -1) for t in targets[0]], *targets[1:]],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", FCOS_TARGETS)
@pytest.mark.parametrize("name", ["cls_loss", "reg_loss", "centerness_loss", "total_loss"])
def test_fcos_loss(published, name, targets, dtype):
    rng = np.random.default_rng(3)
    preds = oracle.head(rng, SIZES, dtype=dtype)
    dense = FCOS_TARGETS[targets](oracle.dense_targets(rng, SIZES, dtype=dtype))
    settings = (3, 0.25, 2.0, 0.5, 2.0, 3.0)
    losses = (module(*settings) for module in (ours.FCOSLoss, published["FCOSLoss"]))
    leaves = [level for term in preds for level in term]
    if targets == "no positives" and name in {"reg_loss", "centerness_loss"}:
        assert [loss(*preds, *dense)[name] for loss in losses] == [0, 0]  # the source gives a bare 0.0
        return
    assert_same(*(lambda loss=loss: loss(*preds, *dense)[name] for loss in losses), leaves, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fcos_loss_with_negative_sides(published, dtype):
    """The false overlap is what the source returns, and stays; only its count is new."""
    preds = [[leaf(np.zeros((1, c, 1, 1)), dtype)] for c in (1, 4, 1)]
    preds[1][0].data[0, :, 0, 0] = torch.tensor([-8.0, -8.0, -8.0, -8.0])
    dense = [[torch.zeros(1, 1, 1, dtype=torch.int64)], [torch.full((1, 4, 1, 1), 4.0).to(dtype)]]
    dense.append([torch.ones(1, 1, 1, dtype=dtype)])
    losses = [module(1)(*preds, *dense)["reg_loss"] for module in (ours.FCOSLoss, published["FCOSLoss"])]
    oracle.assert_close(losses[0], losses[1].item(), rtol=DTYPES[dtype])


def test_the_parameters_have_the_published_names_and_defaults(published):
    for name in ("FocalLoss", "GIoULoss", "CenternessLoss"):
        settings = {key: value for key, value in vars(published[name]()).items() if not key.startswith("_")}
        settings.pop("training")
        module = getattr(ours, name)()
        assert {key: getattr(module, key) for key in settings} == settings
