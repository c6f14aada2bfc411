"""What the reference page, its source and its prose disagree about, and how each is settled."""

import math

import numpy as np
import pytest
import torch

from lossd_server.errors import InvalidInputError
from lossd_server.losses import EvaluationOptions, FCOSLoss, LossPreset
from lossd_server.targets import FCOSAssigner, GroundTruth
from tests.domain import oracle_losses as oracle

SIZES = [(4, 4), (2, 2)]
LTRB = [8.0, 8.0, 24.0, 8.0]


def one_positive(pred=LTRB, target=LTRB, label=0, centerness=1.0, cells=(4, 4)):
    """One level, two classes, zero logits, an object at the first cell."""
    preds = [[torch.zeros(1, channels, *cells)] for channels in (2, 4, 1)]
    preds[1][0][0, :, 0, 0] = torch.tensor(pred)
    targets = [[torch.full((1, *cells), -1)], [torch.zeros(1, 4, *cells)], [torch.zeros(1, *cells)]]
    targets[0][0][0, 0, 0] = label
    targets[1][0][0, :, 0, 0] = torch.tensor(target)
    targets[2][0][0, 0, 0] = centerness
    for term in preds:
        term[0].requires_grad_()
    return preds, targets


def evaluate(loss_fn, preds, targets, **options):
    names = ("cls_preds", "reg_preds", "centerness_preds", "cls_targets", "reg_targets", "centerness_targets")
    arguments = dict(zip(names, [*preds, *targets], strict=True))
    with torch.no_grad():
        return loss_fn.evaluate(loss_fn.prepare(arguments), EvaluationOptions(**options))


ALIASES = {
    "cls_loss_weight": "cls_weight",
    "reg_loss_weight": "reg_weight",
    "centerness_loss_weight": "centerness_weight",
}


@pytest.mark.parametrize("alias", ALIASES)
def test_documented_names_of_weights_are_accepted(alias):
    preds, targets = one_positive(pred=[4.0, 4.0, 4.0, 4.0])
    losses = [FCOSLoss(2, **{name: 3.0})(*preds, *targets)["loss"] for name in (alias, ALIASES[alias])]
    assert losses[0].equal(losses[1])
    assert not losses[0].equal(FCOSLoss(2)(*preds, *targets)["loss"])


@pytest.mark.parametrize("alias", ALIASES)
def test_a_weight_under_both_names_is_refused(alias):
    with pytest.raises(InvalidInputError, match=alias):
        FCOSLoss(2, **{alias: 1.0, ALIASES[alias]: 1.0})


def test_positional_parameters_are_in_the_order_of_the_reference():
    loss_fn = FCOSLoss(2, 0.3, 1.5, 4.0, 5.0, 6.0)
    assert (loss_fn.focal.alpha, loss_fn.focal.gamma, loss_fn.weights) == (0.3, 1.5, (4.0, 5.0, 6.0))


def test_the_usage_example_runs_on_five_levels():
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 100), (50, 50), (25, 25), (13, 13), (7, 7)]
    preds = [[torch.randn(2, c, *size, generator=generator) for size in sizes] for c in (80, 4, 1)]
    targets = [
        {"boxes": torch.tensor([[10, 10, 50, 50], [60, 60, 100, 100]]), "labels": torch.tensor([1, 5])},
        {"boxes": torch.tensor([[20, 20, 40, 40]]), "labels": torch.tensor([3])},
    ]
    loss_fn = FCOSLoss(
        num_classes=80,
        focal_alpha=0.25,
        focal_gamma=2.0,
        cls_loss_weight=1.0,
        reg_loss_weight=1.0,
        centerness_loss_weight=1.0,
    )
    loss_dict = loss_fn(*preds, targets)
    assert loss_dict["loss"].isfinite()
    assert 0 < loss_dict["reg_loss"] < 2


def test_the_documented_custom_ranges_are_accepted():
    ranges = ((-1, 32), (32, 64), (64, 128), (128, 256), (256, float("inf")))
    loss_fn = FCOSLoss(num_classes=80, strides=(8, 16, 32, 64, 128), regress_ranges=ranges)
    assert loss_fn.assigner.ranges == ranges


@pytest.mark.parametrize(
    "form",
    [
        lambda image: {"ground_truth": [image]},
        lambda image: {"cls_targets": [image]},
        lambda image: {"ground_truth": [GroundTruth(**image)]},
    ],
)
def test_ground_truth_comes_fourth_or_by_name(form):
    image = {"boxes": torch.tensor([[0.0, 0.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    preds = oracle.head(np.random.default_rng(0), SIZES, batch=1)
    loss_fn = FCOSLoss(3, assigner=FCOSAssigner(strides=(8, 16), regress_ranges=((-1, 64), (64, 128))))
    assert loss_fn(*preds, **form(image))["loss"].equal(loss_fn(*preds, [image])["loss"])


PRESETS = [
    ({}, "dense", LossPreset.AUTOTIMM),
    ({}, "ground truth", LossPreset.DOCUMENTED),
    ({"preset": "documented"}, "dense", LossPreset.DOCUMENTED),
    ({"preset": "autotimm"}, "ground truth", LossPreset.AUTOTIMM),
]


@pytest.mark.parametrize(("settings", "form", "expected"), PRESETS)
def test_the_preset_follows_the_kind_of_targets_and_is_reported(settings, form, expected):
    preds, targets = one_positive()
    loss_fn = FCOSLoss(2, **settings, strides=(8,), regress_ranges=((-1, 64),))
    arguments = {"cls_preds": preds[0], "reg_preds": preds[1], "centerness_preds": preds[2]}
    if form == "dense":
        arguments.update(zip(("cls_targets", "reg_targets", "centerness_targets"), targets, strict=True))
    else:
        arguments["ground_truth"] = [
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        ]
    evaluation = loss_fn.evaluate(loss_fn.prepare(arguments), EvaluationOptions())
    assert evaluation.preset is expected


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_the_total_has_both_names(preset):
    losses = FCOSLoss(2, preset=preset)(*(part for parts in one_positive() for part in parts))
    assert set(losses) == {"cls_loss", "reg_loss", "centerness_loss", "loss", "total_loss"}
    assert losses["loss"].equal(losses["total_loss"])


@pytest.mark.parametrize(("preset", "factor"), [("autotimm", 5.0), ("documented", 1.0)])
def test_components_are_after_their_weights_in_autotimm_and_before_them_in_documented(preset, factor):
    preds, targets = one_positive(pred=[4.0, 4.0, 4.0, 4.0])
    plain = FCOSLoss(2, preset=preset)(*preds, *targets)
    weighted = FCOSLoss(2, 0.25, 2.0, 5.0, 5.0, 5.0, preset=preset)(*preds, *targets)
    for name in ("cls_loss", "reg_loss", "centerness_loss"):
        oracle.assert_close(weighted[name], factor * plain[name].item())
    oracle.assert_close(weighted["loss"], 5 * plain["loss"].item())


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_weighted_components_sum_to_the_loss(preset):
    preds, targets = one_positive(pred=[4.0, 4.0, 4.0, 4.0], centerness=0.5)
    evaluation = evaluate(FCOSLoss(2, 0.25, 2.0, 2.0, 3.0, 4.0, preset=preset), preds, targets)
    total = sum(component.weight * component.value for component in evaluation.components)
    oracle.assert_close(evaluation.loss, total)


# A prediction of half the target's width and height around the same corner: IoU 1/4, GIoU 1/4.
@pytest.mark.parametrize(("preset", "expected"), [("autotimm", math.log(4)), ("documented", 0.75)])
def test_boxes_are_judged_by_log_iou_in_autotimm_and_by_giou_in_documented(preset, expected):
    preds, targets = one_positive(pred=[8.0, 8.0, 8.0, 0.0], target=[8.0, 8.0, 24.0, 8.0])
    oracle.assert_close(FCOSLoss(2, preset=preset)(*preds, *targets)["reg_loss"], expected)


@pytest.mark.parametrize(("preset", "negatives"), [("autotimm", 1), ("documented", 31)])
def test_unassigned_locations_are_background_only_in_documented(preset, negatives):
    preds, targets = one_positive()
    losses = FCOSLoss(2, preset=preset)(*preds, *targets)
    losses["loss"].backward()
    element = 0.25 * math.log(2)  # focal element of a zero logit before alpha
    oracle.assert_close(losses["cls_loss"], (0.25 + 0.75 * negatives) * element)
    _, slope = oracle.focal_element(0.0, positive=False, alpha=0.25, gamma=2.0)
    oracle.assert_close(preds[0][0].grad[0, 0, 3, 3], slope if preset == "documented" else 0)


def two_levels():
    """Three positives on the first level, one on the second, all logits zero and target centerness 1."""
    preds = [[torch.zeros(1, c, *size) for size in SIZES] for c in (1, 4, 1)]
    targets = [[torch.full((1, *size), -1) for size in SIZES], preds[1], [torch.ones(1, *s) for s in SIZES]]
    targets[0][0][0, 0, :3] = 0
    targets[0][1][0, 0, 0] = 0
    return preds, targets


def test_autotimm_sums_level_means_and_divides_centerness_twice():
    losses = FCOSLoss(1)(*(part for parts in two_levels() for part in parts))
    element = 0.25 * 0.25 * math.log(2)
    oracle.assert_close(losses["cls_loss"], 2 * element)
    oracle.assert_close(losses["reg_loss"], -math.log(1e-7))
    oracle.assert_close(losses["centerness_loss"], 2 * math.log(2) / 4)


def test_documented_divides_sums_over_everything_by_the_number_of_positives():
    losses = FCOSLoss(1, preset="documented")(*(part for parts in two_levels() for part in parts))
    element = 0.25 * math.log(2)
    oracle.assert_close(losses["cls_loss"], (4 * 0.25 + 16 * 0.75) * element / 4)
    oracle.assert_close(losses["reg_loss"], 1)
    oracle.assert_close(losses["centerness_loss"], math.log(2))


@pytest.mark.parametrize(
    "cells", [(3, 5), (4, 5), (5, 4), (5, 5)]
)  # 4 × 4 reads both ways: no shape can tell
def test_regression_targets_with_sides_last_are_refused(cells):
    preds, targets = one_positive(cells=cells)
    targets[1] = [targets[1][0].permute(0, 2, 3, 1)]
    with pytest.raises(InvalidInputError, match=r"reg_targets\[0\]"):
        FCOSLoss(2)(*preds, *targets)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_start_at_zero(label):
    preds, targets = one_positive(label=label)
    FCOSLoss(2)(*preds, *targets)["cls_loss"].backward()
    assert (preds[0][0].grad[0, :, 0, 0] < 0).tolist() == [label == 0, label == 1]


def test_zero_distances_cost_16_118_each_and_have_no_gradient():
    preds, targets = one_positive(pred=[0.0, 0.0, 0.0, 0.0])
    losses = FCOSLoss(2)(*preds, *targets)
    losses["reg_loss"].backward()
    assert losses["reg_loss"].item() == pytest.approx(16.118, abs=1e-3)
    assert not preds[1][0].grad.any()


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_the_entropy_floor_is_what_a_perfect_centerness_costs(preset):
    preds, targets = one_positive(centerness=0.25)
    preds[2][0] = torch.full((1, 1, 4, 4), math.log(1 / 3))
    evaluation = evaluate(FCOSLoss(2, 0.25, 2.0, 1.0, 1.0, 3.0, preset=preset), preds, targets)
    parts = {component.name: component for component in evaluation.components}
    entropy = oracle.entropy(0.25) * (3 if preset == "autotimm" else 1)
    oracle.assert_close(parts["centerness_floor"].value, entropy)
    oracle.assert_close(parts["centerness_loss"].value, entropy)
    assert parts["centerness_floor"].weight == 0


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("side", [0.005, 1e-4, 0.0])
def test_areas_are_floored_at_1e7_square_pixels(preset, side):
    preds, targets = one_positive(pred=[side] * 4, target=[side, side, side, 2 * side])
    losses = FCOSLoss(2, preset=preset)(*preds, *targets)
    losses["loss"].backward()
    boxes = [oracle.numpy_of(term[0])[0, :, 0, 0] for term in (preds[1], targets[1])]
    rows = oracle.log_iou_loss if preset == "autotimm" else oracle.at_location(oracle.giou_loss, 0, 0, 0)
    oracle.assert_close(losses["reg_loss"], rows(*boxes))
    assert preds[1][0].grad.isfinite().all()
