"""The compiled kernel of boxes and centerness gives what torch gives, in every layout and type."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd_server.kernels import load_library
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, GIoULoss
from tests.domain import oracle_losses as oracle
from tests.domain.support import evaluated, needs_a_compiler, without_kernels

pytestmark = needs_a_compiler


@pytest.fixture(autouse=True)
def _kernel():
    assert load_library() is not None


def boxes(count, seed=0):
    """Returns predicted boxes, target boxes that touch, miss or equal them, and weights."""
    made = torch.Generator().manual_seed(seed)
    corners = torch.randint(-6, 7, (2, count, 2, 2), generator=made).float()
    pred, target = corners.sort(dim=2).values.reshape(2, count, 4)
    return pred, target, torch.rand(count, generator=made)


def both_ways(loss, arguments, **options):
    """Returns the evaluation by the kernel and the one by torch."""
    wanted = EvaluationOptions(gradients=loss.differentiable, **options)
    ours = evaluated(loss, arguments, wanted)
    return ours, without_kernels(lambda: evaluated(loss, arguments, wanted))


def assert_alike(ours, torchs, *, rtol=1e-6, atol=1e-12):
    torch.testing.assert_close(ours.loss, torchs.loss, rtol=rtol, atol=atol)
    for name, gradient in torchs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=rtol, atol=atol)
    for name, sums in torchs.raw_sums.items():
        np.testing.assert_allclose(ours.raw_sums[name], sums, rtol=rtol, atol=atol)


LAYOUTS = {
    "rows": lambda x: x,
    "sides": lambda x: x.t().contiguous().t(),
    "rows with gaps": lambda x: torch.cat([x, x], dim=1)[:, :4],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_giou_agrees_with_torch(layout, weighted, reduction):
    pred, target, weights = boxes(300)
    arguments = {"pred_boxes": LAYOUTS[layout](pred), "target_boxes": LAYOUTS[layout](target)}
    arguments |= {"weights": weights} if weighted else {}
    assert_alike(*both_ways(GIoULoss(reduction), arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int16])
def test_boxes_of_every_type_agree_with_torch(dtype, target_dtype):
    pred, target, _ = boxes(70)
    arguments = {"pred_boxes": pred.to(dtype), "target_boxes": target.to(target_dtype)}
    ours, torchs = both_ways(GIoULoss("sum"), arguments, gradient_dtype=torch.float32)
    assert_alike(ours, torchs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_centerness_agrees_with_torch(dtype, reduction):
    pred = torch.cat([torch.linspace(-90, 90, 200), torch.zeros(1)]).to(dtype)
    target = torch.linspace(0, 1, 201)
    arguments = {"pred": pred, "target": target, "weights": torch.linspace(0, 3, 201)}
    ours, torchs = both_ways(CenternessLoss(reduction), arguments, gradient_dtype=torch.float32)
    assert_alike(ours, torchs)
    for ours_part, torchs_part in zip(ours.components, torchs.components, strict=True):
        assert float(ours_part.value) == pytest.approx(float(torchs_part.value), rel=1e-6)


def head(batch=2, sizes=((9, 11), (5, 6), (3, 3)), layout=torch.contiguous_format, dtype=torch.float32):
    """Returns the outputs of a head, and dense targets with ties, empty levels and negative sides."""
    rng = np.random.default_rng(0)
    preds = oracle.head(rng, sizes, batch=batch, requires_grad=False)
    preds = [[level.to(dtype).contiguous(memory_format=layout) for level in kind] for kind in preds]
    targets = oracle.dense_targets(rng, sizes, batch=batch)
    preds[1][0][:, 0] = -1.0
    preds[1][1][:] = targets[1][1]
    targets[0][2].fill_(-1)
    names = ("cls_preds", "reg_preds", "centerness_preds", "cls_targets", "reg_targets", "centerness_targets")
    return dict(zip(names, (*preds, *targets), strict=True))


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_heads_agree_with_torch(dtype, layout, preset):
    arguments = head(layout=layout, dtype=dtype)
    ours, torchs = both_ways(FCOSLoss(3, preset=preset), arguments, gradient_dtype=torch.float32)
    assert_alike(ours, torchs, rtol=2e-6)
    assert ours.negative_side_count == torchs.negative_side_count > 0
    assert all(not gradient.any() for gradient in (ours.gradients["reg_preds"][2],))


def test_gradients_of_a_head_go_where_the_caller_wants_them():
    arguments, loss = head(), FCOSLoss(3)
    fresh = evaluated(loss, arguments, EvaluationOptions(gradients=loss.differentiable))
    places = {
        name: [torch.full_like(level, 7.0) for level in arguments[name]] for name in loss.differentiable
    }
    options = EvaluationOptions(gradients=loss.differentiable, outputs=places)
    evaluated(loss, arguments, options)
    for name, levels in places.items():
        assert all(map(torch.equal, levels, fresh.gradients[name]))


@settings(deadline=None, max_examples=40)
@given(count=st.sampled_from([0, 1, 7, 8, 63, 64, 65, 4096, 4097]), seed=st.integers(0, 9))
def test_every_number_of_rows_is_served(count, seed):
    pred, target, weights = boxes(count, seed)
    arguments = {"pred_boxes": pred, "target_boxes": target, "weights": weights}
    assert_alike(*both_ways(GIoULoss("sum"), arguments))


def test_bits_do_not_depend_on_threads():
    pred, target, weights = boxes(50_000)
    arguments = {"pred_boxes": pred, "target_boxes": target, "weights": weights}
    options, threads = EvaluationOptions(gradients=("pred_boxes",)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluated(GIoULoss(), arguments, options)
        torch.set_num_threads(2)
        two = evaluated(GIoULoss(), arguments, options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.gradients["pred_boxes"], two.gradients["pred_boxes"])


@pytest.mark.parametrize("loss", [GIoULoss("none"), CenternessLoss("none")])
def test_nan_stays_in_its_row(loss):
    pred = torch.ones(3, 4) if isinstance(loss, GIoULoss) else torch.ones(3)
    pred[1] = float("nan")
    arguments = dict(zip(loss.required, (pred, torch.ones_like(pred)), strict=True))
    evaluation = evaluated(loss, arguments, EvaluationOptions(gradients=loss.differentiable))
    assert evaluation.loss.isnan().tolist() == [False, True, False]
    (gradient,) = evaluation.gradients.values()
    assert gradient.isnan().reshape(3, -1).any(dim=1).tolist() == [False, True, False]
