"""Properties that hold for all inputs."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated

EXAMPLES = settings(max_examples=60, deadline=None)
LOGITS = st.floats(-1e4, 1e4, width=32)
SEEDS = st.integers(0, 2**32 - 1)
GAMMAS = st.floats(0, 5)


@st.composite
def focal_inputs(draw, logits=LOGITS):
    rows, classes = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    inputs = draw(arrays.arrays(np.float32, (rows, classes), elements=logits))
    targets = draw(arrays.arrays(np.int64, rows, elements=st.integers(-1, classes - 1)))
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@st.composite
def upright_boxes(draw, n=4):
    """Boxes in quarters of a pixel, 0.25 to 500 px a side, anywhere within 1000 px of the origin."""
    corner = draw(arrays.arrays(np.int32, (n, 2), elements=st.integers(-4000, 4000)))
    extent = draw(arrays.arrays(np.int32, (n, 2), elements=st.integers(1, 2000)))
    return torch.from_numpy(np.hstack([corner, corner + extent]) / 4)


@EXAMPLES
@given(focal_inputs(st.floats(-(2.0**120), 2.0**120, width=32)), GAMMAS)
def test_focal_loss_is_finite_and_not_negative_and_so_is_its_gradient_finite(case, gamma):
    inputs, targets = case
    inputs.requires_grad_()
    loss = FocalLoss(gamma=gamma, reduction="none")(inputs, targets)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert inputs.grad.isfinite().all()


@EXAMPLES
@given(focal_inputs(st.floats(-80, 80, width=32)), st.sampled_from(oracle.GAMMAS))
def test_focal_loss_is_that_of_the_oracle(case, gamma):
    inputs, targets = case
    inputs.requires_grad_()
    loss = FocalLoss(gamma=gamma, reduction="sum")(inputs, targets)
    loss.backward()
    value, gradient = oracle.focal_loss(oracle.numpy_of(inputs), targets, "sum", gamma=gamma)
    oracle.assert_close(loss, value)
    oracle.assert_close(inputs.grad, gradient)


@EXAMPLES
@given(focal_inputs(), SEEDS)
def test_permuting_rows_permutes_what_none_returns(case, seed):
    inputs, targets = case
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    results = []
    for rows in (torch.arange(len(inputs)), order):
        evaluation = evaluated(
            FocalLoss(reduction="none"),
            {"inputs": inputs[rows], "targets": targets[rows]},
            EvaluationOptions(),
        )
        losses = torch.zeros(len(inputs))
        losses[rows[evaluation.kept_rows]] = evaluation.loss
        results.append(losses)
    assert results[0].equal(results[1])


@EXAMPLES
@given(focal_inputs())
def test_mean_and_sum_reduce_what_none_returns(case):
    inputs, targets = case
    rows = FocalLoss(reduction="none")(inputs, targets).double()
    oracle.assert_close(FocalLoss(reduction="sum")(inputs, targets), rows.sum().item())
    oracle.assert_close(FocalLoss(reduction="mean")(inputs, targets), rows.mean().item())


@EXAMPLES
@given(upright_boxes(), upright_boxes())
def test_giou_loss_is_in_0_to_2_and_symmetric(a, b):
    loss = GIoULoss("none")(a, b)
    assert (loss >= -1e-12).all()
    assert (loss <= 2).all()
    oracle.assert_close(GIoULoss("none")(b, a), oracle.numpy_of(loss), atol=1e-12)


@EXAMPLES
@given(upright_boxes())
def test_giou_loss_of_a_box_with_itself_is_zero(boxes):
    oracle.assert_close(GIoULoss("none")(boxes, boxes), 0, atol=1e-12)


@EXAMPLES
@given(upright_boxes(), upright_boxes(), st.integers(-10000, 10000), st.floats(0.1, 10))
def test_giou_loss_does_not_change_when_both_boxes_move_and_grow(a, b, shift, scale):
    moved = GIoULoss("none")((a + shift) * scale, (b + shift) * scale)
    oracle.assert_close(moved, oracle.numpy_of(GIoULoss("none")(a, b)), rtol=1e-6, atol=1e-6)


@EXAMPLES
@given(upright_boxes(6), upright_boxes(6), SEEDS)
def test_permuting_boxes_permutes_their_losses(a, b, seed):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(6))
    assert GIoULoss("none")(a[order], b[order]).equal(GIoULoss("none")(a, b)[order])


@EXAMPLES
@given(
    arrays.arrays(np.float32, 5, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    arrays.arrays(np.float32, 5, elements=st.floats(0, 1, width=32)),
)
def test_centerness_loss_is_never_below_its_floor(pred, target):
    evaluation = evaluated(
        CenternessLoss("sum"),
        {"pred": torch.from_numpy(pred), "target": torch.from_numpy(target)},
        EvaluationOptions(),
    )
    loss, floor = (component.value.item() for component in evaluation.components)
    assert loss >= floor - 1e-12
    assert floor >= 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.5, 100))
def test_documented_loss_of_a_batch_is_the_sum_over_its_images(seed, normalizer):
    rng = np.random.default_rng(seed)
    sizes = [(3, 4), (2, 2)]
    terms = [*oracle.head(rng, sizes, requires_grad=False), *oracle.dense_targets(rng, sizes)]
    names = ("cls_preds", "reg_preds", "centerness_preds", "cls_targets", "reg_targets", "centerness_targets")
    module, options = FCOSLoss(3, preset="documented"), EvaluationOptions(normalizer=normalizer)

    def loss(images):
        arguments = {name: [lv[images] for lv in term] for name, term in zip(names, terms, strict=True)}
        return evaluated(module, arguments, options).loss.item()

    oracle.assert_close(np.array(loss(slice(0, 1)) + loss(slice(1, 2))), loss(slice(0, 2)))
