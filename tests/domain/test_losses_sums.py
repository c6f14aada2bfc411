"""Raw sums and normalizers: what several workers need to agree on one loss."""

import math

import numpy as np
import pytest
import torch

from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

SIZES = [(4, 5), (3, 2)]
NAMES = ("cls_preds", "reg_preds", "centerness_preds", "cls_targets", "reg_targets", "centerness_targets")
COMPONENTS = ("cls_loss", "reg_loss", "centerness_loss")
WEIGHTS = (0.5, 2.0, 3.0)


def batch(images=4, seed=0):
    rng = np.random.default_rng(seed)
    preds = oracle.head(rng, SIZES, batch=images, requires_grad=False)
    return [*preds, *oracle.dense_targets(rng, SIZES, batch=images)]


def images_of(arguments, span):
    return [[level[span] for level in term] for term in arguments]


def evaluate(preset, arguments, **options):
    loss_fn = FCOSLoss(3, 0.25, 2.0, *WEIGHTS, preset=preset)
    named = dict(zip(NAMES, arguments, strict=True))
    return evaluated(loss_fn, named, EvaluationOptions(gradients=NAMES[:3], **options))


def test_raw_sums_are_sums_by_level_before_weights_and_division():
    arguments = batch()
    sums = evaluate("documented", arguments).raw_sums
    assert all(levels.shape == (2,) and levels.dtype == np.float64 for levels in sums.values())
    for level in range(2):
        maps = [oracle.numpy_of(term[level]) for term in arguments]
        at = np.argwhere(maps[3] >= 0)
        entries = [(maps[2][b, 0, i, j], maps[5][b, i, j]) for b, i, j in at]
        expected = {
            "cls_loss": oracle.focal(maps[0], maps[3], background=True)[0].sum(),
            "reg_loss": sum(oracle.giou_loss(*flipped(maps, b, i, j)) for b, i, j in at),
            "centerness_loss": sum(oracle.bce(*entry)[0] for entry in entries),
            "centerness_target": sum(target for _, target in entries),
            "valid_count": maps[3].size,
            "positive_count": len(at),
        }
        assert {name: total[level].item() for name, total in sums.items()} == pytest.approx(
            expected, rel=1e-6
        )


def flipped(maps, b, i, j):
    """Predicted and target box around the origin."""
    return [m[b, :, i, j] * [-1, -1, 1, 1] for m in (maps[1], maps[4])]


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_raw_sums_of_half_batches_add_up_to_those_of_the_whole(preset):
    arguments = batch()
    whole = evaluate(preset, arguments).raw_sums
    halves = [evaluate(preset, images_of(arguments, span)).raw_sums for span in (slice(2), slice(2, 4))]
    for name, total in whole.items():
        oracle.assert_close(halves[0][name] + halves[1][name], total, rtol=1e-6)


def test_documented_half_batches_with_the_whole_count_add_up_to_the_whole():
    arguments = batch()
    whole = evaluate("documented", arguments)
    count = whole.raw_sums["positive_count"].sum().item()
    spans = (slice(2), slice(2, 4))
    halves = [evaluate("documented", images_of(arguments, span), normalizer=count) for span in spans]
    oracle.assert_close(halves[0].loss + halves[1].loss, whole.loss.item())
    for name in NAMES[:3]:
        for level, gradient in enumerate(whole.gradients[name]):
            together = torch.cat([half.gradients[name][level] for half in halves])
            oracle.assert_close(together, oracle.numpy_of(gradient), atol=1e-12)


def test_any_worker_can_finish_the_documented_loss_from_raw_sums():
    evaluation = evaluate("documented", batch())
    sums = evaluation.raw_sums
    count = max(sums["positive_count"].sum(), 1)
    total = sum(w * sums[name].sum() / count for w, name in zip(WEIGHTS, COMPONENTS, strict=True))
    oracle.assert_close(evaluation.loss, total.item())


def test_any_worker_can_finish_the_autotimm_loss_from_raw_sums():
    evaluation = evaluate("autotimm", batch())
    sums = evaluation.raw_sums
    positives, count = np.maximum(sums["positive_count"], 1), max(sums["positive_count"].sum(), 1)
    divisors = (np.maximum(sums["valid_count"], 1), count, positives * count)
    terms = zip(WEIGHTS, COMPONENTS, divisors, strict=True)
    oracle.assert_close(evaluation.loss, sum((w * sums[name] / d).sum() for w, name, d in terms).item())


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_a_normalizer_stands_in_for_the_number_of_positives(preset):
    arguments = batch()
    evaluation = evaluate(preset, arguments, normalizer=7.5)
    levels = [[oracle.numpy_of(level) for level in term] for term in arguments]
    expected, gradients = oracle.fcos(
        levels[:3], levels[3:], preset=preset, strides=(8, 16), weights=WEIGHTS, normalizer=7.5
    )
    oracle.assert_close(evaluation.loss, expected["loss"])
    for level, gradient in enumerate(evaluation.gradients["centerness_preds"]):
        oracle.assert_close(gradient, gradients[2][level])


def test_a_normalizer_below_one_is_taken_as_it_is():
    arguments = batch()
    doubled = evaluate("documented", arguments, normalizer=0.25).loss
    oracle.assert_close(doubled, 2 * evaluate("documented", arguments, normalizer=0.5).loss.item())


SINGLE = {
    "focal": (
        FocalLoss(),
        {"inputs": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "targets": torch.tensor([0, -1])},
        {"cls_loss", "valid_count", "positive_count"},
    ),
    "giou": (
        GIoULoss(),
        {
            "pred_boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0]]),
            "target_boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]),
            "weights": torch.tensor([4.0]),
        },
        {"reg_loss", "weight", "positive_count"},
    ),
    "centerness": (
        CenternessLoss(),
        {"pred": torch.tensor([0.0]), "target": torch.tensor([0.25]), "weights": torch.tensor([4.0])},
        {"centerness_loss", "centerness_target", "weight", "positive_count"},
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_normalizer_divides_the_sum_and_its_gradient(name):
    module, arguments, _ = SINGLE[name]
    total = next(iter(evaluated(module, arguments, EvaluationOptions()).raw_sums.values())).item()
    wanted = EvaluationOptions(gradients=module.differentiable, normalizer=8.0)
    by_eight = evaluated(module, arguments, wanted)
    as_sum = evaluated(
        type(module)(reduction="sum"), arguments, EvaluationOptions(gradients=module.differentiable)
    )
    oracle.assert_close(by_eight.loss, total / 8)
    (key,) = module.differentiable
    oracle.assert_close(by_eight.gradients[key], oracle.numpy_of(as_sum.gradients[key]) / 8)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_raw_sums_do_not_depend_on_the_reduction(reduction, name):
    module, arguments, keys = SINGLE[name]
    sums = evaluated(type(module)(reduction=reduction), arguments, EvaluationOptions()).raw_sums
    assert set(sums) == keys
    assert all(
        np.array_equal(value, evaluated(module, arguments, EvaluationOptions()).raw_sums[k])
        for k, value in sums.items()
    )


def test_single_losses_report_weights_and_targets():
    _, arguments, _ = SINGLE["centerness"]
    sums = evaluated(CenternessLoss(), arguments, EvaluationOptions()).raw_sums
    assert sums["centerness_loss"].item() == pytest.approx(4 * math.log(2))
    assert (sums["centerness_target"].item(), sums["weight"].item(), sums["positive_count"].item()) == (
        0.25,
        4,
        1,
    )


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_positives_with_a_negative_side_are_counted_and_no_others(preset):
    arguments = [level[:1] for level in batch(1)]
    labels, sides = arguments[3][0], arguments[1][0]
    labels.fill_(-1)
    labels[0, 0, :3] = 0
    sides[0, 1, 0, 0] = -1  # one side
    sides[0, :, 0, 1] = -1  # all sides: still one row
    sides[0, 2, 3, 3] = -1  # no positive
    assert evaluate(preset, arguments).negative_side_count == 2


def test_negative_sides_on_both_axes_are_a_false_overlap_in_autotimm_alone():
    arguments = [level[:1] for level in batch(1)]
    arguments[3][0].fill_(-1)[0, 0, 0] = 0
    arguments[1][0][0, :, 0, 0] = -8
    arguments[4][0][0, :, 0, 0] = 4
    reg = {
        preset: evaluate(preset, arguments).raw_sums["reg_loss"][0].item()
        for preset in ("autotimm", "documented")
    }
    # I = 16², U = 16² + 8² - 16²; as boxes, the prediction is inverted and overlaps nothing.
    assert reg["autotimm"] == pytest.approx(-math.log(4))
    assert reg["documented"] == pytest.approx(oracle.giou_loss([8, 8, -8, -8], [-4, -4, 4, 4]))
