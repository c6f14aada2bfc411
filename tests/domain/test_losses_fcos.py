"""The combined loss: both presets against the oracle, value and gradient."""

import math

import numpy as np
import pytest
import torch

from lossd_server.losses import EvaluationOptions, FCOSLoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

STRIDES = (8, 16, 32)
RANGES = ((-1.0, 32.0), (32.0, 64.0), (64.0, math.inf))
SIZES = [(7, 6), (4, 3), (2, 2)]
WEIGHTS = (0.5, 2.0, 3.0)
NAMES = ("cls_preds", "reg_preds", "centerness_preds")
GROUND_TRUTH = [
    {
        "boxes": torch.tensor([[2.0, 3.5, 30.25, 40.0], [0.0, 0.0, 48.0, 56.0], [10.0, 10.0, 44.5, 38.0]]),
        "labels": torch.tensor([2, 0, 1]),
    },
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    {"boxes": torch.tensor([[5.0, 1.0, 17.0, 50.75]]), "labels": torch.tensor([1])},
]


def module(preset=None, **settings):
    weights = dict(zip(("cls_weight", "reg_weight", "centerness_weight"), WEIGHTS, strict=True))
    return FCOSLoss(3, **{**weights, **settings}, strides=STRIDES, regress_ranges=RANGES, preset=preset)


def oracle_targets(ground_truth=GROUND_TRUTH):
    pairs = [(image["boxes"].tolist(), image["labels"].tolist()) for image in ground_truth]
    return oracle.assign(pairs, SIZES, STRIDES, RANGES)


def as_tensors(targets):
    kinds = (torch.int64, torch.float32, torch.float32)
    return [[torch.tensor(level, dtype=kind) for level in t] for t, kind in zip(targets, kinds, strict=True)]


def as_arrays(levels):
    return [[oracle.numpy_of(level) for level in term] for term in levels]


def assert_as_oracle(loss_fn, preds, targets, preset, given=None, *, rtol=1e-6, gamma=2.0):
    """Compares values, and gradients of the total.

    Slopes of boxes come from differences, and the assigner's centerness, which a slope has subtracted,
    is rounded to float32: both have a floor.
    """
    losses = loss_fn(*preds, *(targets if given is None else given))
    losses["total_loss"].backward()
    expected, gradients = oracle.fcos(
        as_arrays(preds),
        as_arrays(targets),
        preset=preset,
        strides=STRIDES[: len(preds[0])],
        weights=WEIGHTS,
        gamma=gamma,
    )
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=rtol)
    largest = max(abs(level).max(initial=0) for level in gradients[2])
    floors = (oracle.TINY, 1e-9, oracle.TINY if given is None else 1e-6 * largest)
    for term, floor in enumerate(floors):
        for level, pred in enumerate(preds[term]):
            oracle.assert_close(pred.grad, gradients[term][level], rtol=rtol, atol=floor)


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_dense_targets_give_what_the_oracle_gives(preset, gamma):
    rng = np.random.default_rng(6)
    preds, targets = oracle.head(rng, SIZES), oracle.dense_targets(rng, SIZES)
    assert_as_oracle(module(preset, focal_gamma=gamma), preds, targets, preset, gamma=gamma)


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ground_truth_gives_what_the_oracle_gives(preset, dtype):
    preds = oracle.head(np.random.default_rng(7), SIZES, batch=3, dtype=dtype)
    targets = as_tensors(oracle_targets())
    assert_as_oracle(module(preset), preds, targets, preset, given=[GROUND_TRUTH])


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_are_computed_in_float32(preset, dtype):
    rng = np.random.default_rng(8)
    preds = oracle.head(rng, SIZES, dtype=dtype, requires_grad=False)
    targets = oracle.dense_targets(rng, SIZES, dtype=dtype)
    arguments = dict(
        zip((*NAMES, "cls_targets", "reg_targets", "centerness_targets"), [*preds, *targets], strict=True)
    )
    options = EvaluationOptions(gradients=NAMES, gradient_dtype=torch.float32)
    evaluation = evaluated(module(preset), arguments, options)
    expected, gradients = oracle.fcos(
        as_arrays(preds), as_arrays(targets), preset=preset, strides=STRIDES, weights=WEIGHTS
    )
    oracle.assert_close(evaluation.loss, expected["loss"])
    assert evaluation.loss.dtype == torch.float32
    for term in (0, 2):  # half-precision distances tie with their targets, where differences fail
        for level, gradient in enumerate(evaluation.gradients[NAMES[term]]):
            oracle.assert_close(gradient, gradients[term][level])


def test_strides_of_the_maps_do_not_matter():
    rng = np.random.default_rng(9)
    preds, targets = oracle.head(rng, SIZES, requires_grad=False), oracle.dense_targets(rng, SIZES)
    expected = module()(*preds, *targets)["loss"]
    channels_last = [[level.to(memory_format=torch.channels_last) for level in term] for term in preds]
    sliced = [[level.repeat_interleave(2, dim=-1)[..., ::2] for level in term] for term in preds]
    turned = [[level.mT.contiguous().mT for level in term] for term in targets]
    for maps in (channels_last, sliced):
        assert module()(*maps, *turned)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_of_channels_last_maps_is_right():
    rng = np.random.default_rng(10)
    preds = [
        [level.to(memory_format=torch.channels_last).detach().requires_grad_() for level in term]
        for term in oracle.head(rng, SIZES, requires_grad=False)
    ]
    assert_as_oracle(module(), preds, oracle.dense_targets(rng, SIZES), "autotimm")


def test_components_can_be_differentiated_one_by_one():
    rng = np.random.default_rng(11)
    for preset in ("autotimm", "documented"):
        preds, targets = oracle.head(rng, SIZES), oracle.dense_targets(rng, SIZES)
        losses = module(preset)(*preds, *targets)
        scale = WEIGHTS if preset == "documented" else (1, 1, 1)
        together = sum(w * losses[name] for w, name in zip(scale, losses, strict=False))
        together.backward()
        apart = [level.grad.clone() for term in preds for level in term]
        for term in preds:
            for level in term:
                level.grad = None
        losses = module(preset)(*preds, *targets)
        losses["loss"].backward()
        for gradient, level in zip(apart, (level for term in preds for level in term), strict=True):
            oracle.assert_close(level.grad, oracle.numpy_of(gradient))


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_a_batch_of_no_images_gives_exactly_zero(preset):
    rng = np.random.default_rng(12)
    preds = oracle.head(rng, SIZES, batch=0)
    losses = module(preset)(*preds, *oracle.dense_targets(rng, SIZES, batch=0))
    losses["loss"].backward()
    assert {loss.item() for loss in losses.values()} == {0.0}
    assert preds[0][0].grad.shape == (0, 3, *SIZES[0])


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_a_level_without_cells_adds_nothing(preset):
    rng = np.random.default_rng(13)
    sizes = [SIZES[0], (0, 4), SIZES[2]]
    preds, targets = oracle.head(rng, sizes), oracle.dense_targets(rng, sizes)
    assert_as_oracle(module(preset), preds, targets, preset)


def test_autotimm_without_positives_is_exactly_zero_whatever_the_predictions():
    preds = [[torch.full((1, c, 2, 2), math.inf, requires_grad=True)] for c in (3, 4, 1)]
    targets = [[torch.full((1, 2, 2), -1)], [torch.zeros(1, 4, 2, 2)], [torch.zeros(1, 2, 2)]]
    losses = FCOSLoss(3)(*preds, *targets)
    losses["loss"].backward()
    assert {loss.item() for loss in losses.values()} == {0.0}
    assert not any(level.grad.any() for term in preds for level in term)


def test_documented_without_objects_is_background_alone():
    preds = oracle.head(np.random.default_rng(14), SIZES, batch=1)
    losses = module("documented")(*preds, [GROUND_TRUTH[1]])
    background = sum(
        oracle.focal(pred, np.full((1, *pred.shape[2:]), -1), background=True)[0].sum()
        for pred in as_arrays(preds)[0]
    )
    oracle.assert_close(losses["cls_loss"], background)
    assert (losses["reg_loss"].item(), losses["centerness_loss"].item()) == (0, 0)


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("off", [0, 1, 2])
def test_a_weight_of_zero_switches_its_component_off(preset, off):
    weights = [0.0 if term == off else 1.0 for term in range(3)]
    rng = np.random.default_rng(15)
    preds, targets = oracle.head(rng, SIZES), oracle.dense_targets(rng, SIZES)
    FCOSLoss(3, 0.25, 2.0, *weights, preset=preset)(*preds, *targets)["loss"].backward()
    assert [any(level.grad.any() for level in term) for term in preds] == [w > 0 for w in weights]


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_weights_that_are_all_zero_give_zero(preset):
    rng = np.random.default_rng(16)
    preds, targets = oracle.head(rng, SIZES), oracle.dense_targets(rng, SIZES)
    assert FCOSLoss(3, 0.25, 2.0, 0, 0, 0, preset=preset)(*preds, *targets)["loss"].item() == 0


def test_crowd_regions_take_no_part():
    crowd = {
        "boxes": torch.tensor([[0.0, 0.0, 48.0, 56.0]]),
        "labels": torch.tensor([0]),
        "iscrowd": torch.tensor([1]),
    }
    preds = oracle.head(np.random.default_rng(17), SIZES, batch=1)
    losses = module()(*preds, [crowd])
    losses["loss"].backward()
    inside = np.zeros(SIZES[0], bool)
    inside[:7, :6] = True
    assert not preds[0][0].grad[0, 0].numpy()[inside].any()
    assert losses["reg_loss"].item() == 0


WIDE_BOX = [0.0, 0.0, 300.0, 300.0]  # 90,000 px², above the largest float16


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int32, torch.int64],
)
def test_boxes_of_any_type_are_taken_and_large_ones_get_positives(dtype):
    generator = torch.Generator().manual_seed(18)
    preds = [[torch.randn(1, c, 3, 3, generator=generator)] for c in (1, 4, 1)]
    loss_fn = FCOSLoss(1, strides=(100,), regress_ranges=((-1, math.inf),))
    arguments = dict(zip(NAMES, preds, strict=True))
    image = {"boxes": torch.tensor([WIDE_BOX]).to(dtype), "labels": torch.zeros(1, dtype=torch.uint8)}
    evaluation = evaluated(loss_fn, {**arguments, "ground_truth": [image]}, EvaluationOptions())
    assert evaluation.raw_sums["positive_count"].tolist() == [9]


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_dense_labels_of_every_signed_type_are_taken(preset, dtype):
    rng = np.random.default_rng(19)
    preds, targets = oracle.head(rng, SIZES), oracle.dense_targets(rng, SIZES)
    narrow = [[level.to(dtype) for level in targets[0]], *targets[1:]]
    assert module(preset)(*preds, *narrow)["loss"].equal(module(preset)(*preds, *targets)["loss"])


def test_levels_may_have_types_of_their_own():
    rng = np.random.default_rng(20)
    preds, targets = oracle.head(rng, SIZES, dtype=torch.float64), oracle.dense_targets(rng, SIZES)
    mixed = [
        [level.detach().to(dtype).requires_grad_() for level, dtype in zip(term, order, strict=True)]
        for term, order in zip(preds, [(torch.float64, torch.float32, torch.float16)] * 3, strict=True)
    ]
    wide = [[level.detach().double().requires_grad_() for level in term] for term in mixed]
    for levels in (mixed, wide):
        module()(*levels, *targets)["loss"].backward()
    for of_mixed, of_wide in zip(mixed, wide, strict=True):
        for level, expected, rtol in zip(of_mixed, of_wide, (1e-12, 1e-6, 1e-3), strict=True):
            assert level.grad.dtype == level.dtype
            oracle.assert_close(
                level.grad, oracle.numpy_of(expected.grad), rtol=rtol, atol=1e-7 * (rtol > 1e-6)
            )
