"""Crowd regions are neither positive nor background, whichever way the targets come."""

import pytest
import torch

from lossd_server.errors import InvalidInputError
from lossd_server.losses import EvaluationOptions, FCOSLoss
from tests.domain.support import evaluated

OBJECTS = [
    {
        "boxes": torch.tensor([[0.0, 0, 24, 24], [16, 16, 64, 64]]),
        "labels": torch.tensor([1, 0]),
        "iscrowd": torch.tensor([False, True]),
    }
]


def dense_targets(loss, size):
    (level,) = loss.assigner.assign(OBJECTS, [size]).dense()
    names = {"cls_targets": level.cls, "reg_targets": level.reg, "centerness_targets": level.centerness}
    targets = {name: [torch.from_numpy(array)] for name, array in names.items()}
    return targets, [torch.from_numpy(level.ignored)]


@pytest.fixture
def head():
    torch.manual_seed(0)
    return {
        "cls_preds": [torch.randn(1, 2, 8, 8)],
        "reg_preds": [torch.rand(1, 4, 8, 8) * 20],
        "centerness_preds": [torch.randn(1, 1, 8, 8)],
    }


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_dense_targets_with_ignored_give_what_ground_truth_gives(head, preset):
    loss = FCOSLoss(2, strides=(8,), regress_ranges=((-1, 1000),), preset=preset)
    dense, ignored = dense_targets(loss, (8, 8))
    assert loss(**head, **dense, ignored_targets=ignored) == loss(**head, ground_truth=OBJECTS)


def test_ignored_locations_have_no_gradient_and_the_others_do(head):
    loss = FCOSLoss(2, strides=(8,), regress_ranges=((-1, 1000),), preset="documented")
    dense, (ignored,) = dense_targets(loss, (8, 8))
    arguments = {**head, **dense, "ignored_targets": [ignored]}
    evaluation = evaluated(loss, arguments, EvaluationOptions(gradients=("cls_preds",)))
    (gradient,) = evaluation.gradients["cls_preds"]
    assert ignored.any()
    assert torch.equal((gradient == 0).all(dim=1), ignored)
    assert evaluation.raw_sums["valid_count"].item() == (~ignored).sum()


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ([torch.zeros(1, 8, 8)], r"ignored_targets\[0\]: dtype is float32"),
        ([torch.zeros(1, 8, 7, dtype=torch.bool)], r"ignored_targets\[0\]: shape is \[1, 8, 7\]"),
    ],
)
def test_ignored_that_do_not_fit_are_refused(head, ignored, message):
    loss = FCOSLoss(2, strides=(8,), regress_ranges=((-1, 1000),))
    dense, _ = dense_targets(loss, (8, 8))
    with pytest.raises(InvalidInputError, match=message):
        loss(**head, **dense, ignored_targets=ignored)
