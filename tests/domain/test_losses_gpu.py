"""The GPU's programs against the definitions: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from itertools import product
from threading import Event

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lossd_server.errors import InvalidInputError
from lossd_server.losses import EvaluationOptions, FCOSLoss, FocalLoss, fcos_terms, focal
from lossd_server.losses.focal import count_objects_on_gpu
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid, flat, grid, taking_part
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import (
    compile_programs,
    focal_sums_on_gpu,
    head_sums_on_gpu,
    launch,
    library,
    load_programs,
    row_sums_on_gpu,
)
from lossd_server.losses.gpu.focal import _steps_each as steps_each
from lossd_server.losses.row_group import RowGroup
from tests.domain import oracle_losses as oracle

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, and by nothing else

pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.7.1")

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU here")

HALVES = (torch.float16, torch.bfloat16)
PRECISION = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of one number; the interpreter cuts bfloat16 off where a GPU rounds it."""
EXP_ERROR = 2.4e-7
"""Relative, of e^-|x| at the worst: 2 units in the last place of a GPU's own 2^x."""
SMALLEST = {torch.float32: oracle.TINY, torch.float16: 6e-8, torch.bfloat16: oracle.TINY}

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "some of the images": lambda x: torch.cat([x, x]).as_strided(x.shape, (2 * x.stride(0), *x.stride()[1:])),
    "transposed maps": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "not on 16 bytes": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape),
}


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    if not HAS_GPU:
        fuse(monkeypatch)
    assert load_programs(DEVICE) is not None


def fuse(monkeypatch):
    """Lets the interpreter round a fused multiply-add once, as a GPU does; it rounds twice."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(_self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


def logits_and_labels(shape, *, scale=4.0, seed=0):
    made = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    logits = torch.randn(*shape, generator=made) * scale
    return logits.to(DEVICE), torch.randint(-1, classes, (batch, height, width), generator=made).to(DEVICE)


def problem(logits, labels, *, scale=0.3, dtype=None, rows=False, ignored=None, **settings):
    """Returns a grid whose results are to be written over what is there."""
    gradient = torch.full_like(logits, 7, dtype=dtype)
    return FocalGrid(
        logits=grid(logits),
        labels=labels.flatten(1),
        gradient=grid(gradient),
        scale=scale,
        rows=torch.full_like(labels.flatten(1), 7, dtype=torch.float32) if rows else None,
        ignored=None if ignored is None else ignored.flatten(1),
        **settings,
    )


def solve(grids, *, alpha=0.25, gamma=2.0):
    sums = focal_sums_on_gpu(grids, FocalConstants(alpha=alpha, gamma=gamma))
    assert sums is not None
    return sums.losses.cpu()


def check(given, *, alpha=0.25, gamma=2.0, scale=0.3):
    """Solves a problem, and compares everything with the definition."""
    (total,) = solve([given], alpha=alpha, gamma=gamma)
    rows, slopes = oracle.focal(
        oracle.numpy_of(given.logits.cpu()),
        given.labels.cpu(),
        alpha=alpha,
        gamma=gamma,
        background=given.background,
    )
    counts = taking_part(given).cpu().numpy() | (given.labels.cpu().numpy() >= 0)
    rows, slopes = rows * counts, slopes * counts[:, None]
    precision = (gamma + 1) * EXP_ERROR  # which a power multiplies
    oracle.assert_close(float(total), rows.sum(), rtol=precision)
    dtype = given.gradient.dtype
    precision = max(PRECISION[dtype], precision)
    oracle.assert_close(given.gradient.cpu(), scale * slopes, rtol=precision, atol=SMALLEST[dtype])
    if given.rows is not None:
        oracle.assert_close(given.rows.cpu(), rows, rtol=(gamma + 1) * EXP_ERROR)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", PRECISION)
def test_every_layout_and_type(layout, dtype):
    logits, labels = logits_and_labels((2, 8, 8, 9))
    check(problem(LAYOUTS[layout](logits.to(dtype)), labels, background=True, rows=True))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 5, 1), (1, 40, 1, 3), (2, 17, 13, 5), (1, 2, 8, 8), (2, 5, 9, 15)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_every_shape(shape, layout):
    logits, labels = logits_and_labels(shape)
    check(problem(LAYOUTS[layout](logits), labels))


@pytest.mark.parametrize(
    ("gamma", "alpha"), [*product((*oracle.GAMMAS, 3.0, 4.0, 6.0), (0.25,)), *product((2.0,), oracle.ALPHAS)]
)
def test_every_constant(gamma, alpha):
    logits, labels = logits_and_labels((1, 5, 6, 7))
    check(problem(logits, labels, background=True), gamma=gamma, alpha=alpha)


@pytest.mark.parametrize("layout", ["rows", "classes"])
def test_rows_of_logits(layout):
    logits = torch.randn(150, 21, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits = logits if layout == "rows" else logits.t().contiguous().t()
    labels = torch.randint(-1, 21, (150,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    check(problem(logits, labels.unsqueeze(0)))


LABELS = {
    "all of them": lambda labels: labels.clamp(min=0),
    "none": lambda labels: torch.full_like(labels, -1),
    "a few": lambda labels: labels.where(
        torch.arange(labels[0].numel()).reshape(labels[0].shape) % 50 == 7, -1
    ),
    "some": lambda labels: labels,
}


@pytest.mark.parametrize("pattern", LABELS)
@pytest.mark.parametrize("kind", ["positives", "background", "ignored"])
@pytest.mark.parametrize("width", [torch.int64, torch.int32, torch.int8])
def test_every_pattern_of_labels(pattern, kind, width):
    logits, labels = logits_and_labels((2, 6, 10, 12))
    labels = LABELS[pattern](labels.cpu()).to(DEVICE, width)
    ignored = (labels < 0) & (torch.rand(labels.shape, device=DEVICE) < 0.5) if kind == "ignored" else None
    check(problem(logits, labels, background=kind != "positives", ignored=ignored, rows=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(dtype):
    logits, labels = logits_and_labels((1, 6, 8, 8))
    half = problem(logits.to(dtype), labels, dtype=torch.float32)
    wide = problem(logits.to(dtype).float(), labels)
    torch.testing.assert_close(solve([half]), solve([wide]), rtol=1e-7, atol=0)  # added up in another order
    assert torch.equal(half.gradient, wide.gradient)


def test_value_alone_is_the_same():
    logits, labels = logits_and_labels((2, 6, 8, 8))
    alone = FocalGrid(logits=grid(logits), labels=labels.flatten(1))
    assert torch.equal(solve([alone]), solve([problem(logits, labels)]))


def test_extreme_logits_stay_finite_and_nan_stays_in_its_cell():
    logits = torch.tensor([[300.0, -300.0, 3e38, -3e38, 1e-40, float("nan")]], device=DEVICE).repeat(2, 1)
    given = problem(logits, torch.tensor([[0, 1]], device=DEVICE))
    solve([given])
    assert torch.isfinite(given.gradient[:, :5]).all()
    assert given.gradient[:, 5].isnan().all()


def test_what_a_location_without_a_part_holds_does_not_matter():
    logits, labels = logits_and_labels((1, 4, 8, 8))
    spoiled = logits.where((labels >= 0).unsqueeze(1), torch.tensor(float("nan")))
    clean, odd = problem(logits, labels, rows=True), problem(spoiled, labels, rows=True)
    assert torch.equal(solve([clean]), solve([odd]))
    assert torch.equal(clean.gradient, odd.gradient)
    assert torch.equal(clean.rows, odd.rows)


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_magnitude_loses_digits(magnitude, sign):
    logits = sign * magnitude * (1 + torch.rand(1, 5, 8, 8, generator=torch.Generator().manual_seed(5)))
    labels = torch.randint(-1, 5, (1, 8, 8), generator=torch.Generator().manual_seed(6))
    check(problem(logits.to(DEVICE), labels.to(DEVICE), background=True))


def test_never_less_accurate_than_plain_float32():
    logits, labels = logits_and_labels((1, 80, 13, 13), scale=2.0)
    logits -= 2
    ours = problem(logits, labels, scale=1.0)
    solve([ours])
    plain = logits.clone().requires_grad_()
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 80).permute(0, 3, 1, 2).float()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(plain, one_hot, reduction="none")
    weight = (0.25 * one_hot + 0.75 * (1 - one_hot)) * (labels >= 0).unsqueeze(1)
    (weight * (1 - torch.exp(-entropy)) ** 2 * entropy).sum().backward()
    _, exact = oracle.focal(oracle.numpy_of(logits.cpu()), labels.cpu())
    errors = [
        np.linalg.norm(oracle.numpy_of(x.cpu()).reshape(exact.shape) - exact)
        for x in (ours.gradient, plain.grad)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 2, 2)])
def test_empty_grids_are_zero(shape):
    given = FocalGrid(
        logits=torch.zeros(shape, device=DEVICE).flatten(2)
        if shape[1]
        else torch.zeros(2, 0, 4, device=DEVICE),
        labels=torch.full((shape[0], shape[2] * shape[3]), -1, device=DEVICE),
        rows=torch.full((shape[0], shape[2] * shape[3]), 7.0, device=DEVICE),
        background=True,
    )
    full = problem(*logits_and_labels((1, 3, 2, 2)))
    sums = solve([given, full, given])
    assert sums[0] == sums[2] == 0
    assert sums[1] == solve([full])[0]
    assert not given.rows.any()


def test_means_are_the_sums_over_their_divisors_rounded_once():
    shapes = [(1, 3, 2, 2), (2, 8, 8, 9), (1, 40, 1, 3)]
    grids = [
        problem(*logits_and_labels(s), divisor=d) for s, d in zip(shapes, (1.0, 7.0, 1e-30), strict=True)
    ]
    found = focal_sums_on_gpu(grids, FocalConstants(alpha=0.25, gamma=2.0))
    divisors = torch.tensor([grid.divisor for grid in grids], dtype=torch.float64)
    assert torch.equal(found.means.cpu(), (found.losses.cpu() / divisors).to(torch.float32))


def launches(monkeypatch, call):
    """Returns how often programs were launched."""
    from lossd_server.losses.gpu import programs

    names = []
    for name in ("focal_program", "rows_program"):
        program = getattr(programs, name)

        class Counted:
            def __init__(self, name, program):
                self.name, self.program = name, program

            def __getitem__(self, count):
                names.append(self.name)
                return self.program[count]

        monkeypatch.setattr(programs, name, Counted(name, program))
    call()
    return names


def test_levels_go_together_and_come_out_as_if_alone(monkeypatch):
    shapes = [(2, 20, 8, 12), (2, 20, 5, 7), (2, 20, 0, 3), (2, 20, 1, 2), (2, 20, 16, 16)]
    grids = [problem(*logits_and_labels(shape, seed=i), background=True) for i, shape in enumerate(shapes)]
    each = torch.cat([solve([level]) for level in grids])
    alone = [level.gradient.clone() for level in grids]
    found = []
    assert launches(monkeypatch, lambda: found.append(solve(grids))) == ["focal_program"]
    assert torch.equal(found[0], each)
    assert all(torch.equal(level.gradient, its) for level, its in zip(grids, alone, strict=True))


def test_grids_of_many_kinds_come_out_in_their_order():
    kinds = [(dtype, layout) for dtype in PRECISION for layout in ("contiguous", "channels last")]
    grids = [
        problem(
            LAYOUTS[layout](logits_and_labels((1, 4, 2, 2), seed=i)[0].to(dtype)),
            logits_and_labels((1, 4, 2, 2))[1],
        )
        for i, (dtype, layout) in enumerate(kinds)
    ]
    grids += [problem(*logits_and_labels((1, 4, 2, 2), seed=i)) for i in range(34)]
    assert torch.equal(solve(grids), torch.cat([solve([each]) for each in grids]))


def test_same_bits_every_time():
    given = [problem(*logits_and_labels((2, 17, 9, 9), seed=i)) for i in range(2)]
    first, gradient = solve(given), given[0].gradient.clone()
    for _ in range(2):
        assert torch.equal(solve(given), first)
        assert torch.equal(given[0].gradient, gradient)


def test_who_comes_again_with_the_same_uploads_nothing():
    given = [problem(*logits_and_labels((2, 17, 9, 9), seed=i)) for i in range(2)]
    first = solve(given)
    uploads = launch._uploaded.cache_info().misses
    given[0].logits.neg_()
    changed = solve(given)
    assert launch._uploaded.cache_info().misses == uploads
    assert changed[0] != first[0]
    assert changed[1] == first[1]


@needs_gpu
def test_streams_at_a_time_do_not_count_for_each_other():
    given = [problem(*logits_and_labels((4, 80, 60, 60), seed=i)) for i in range(3)]
    expected = solve(given)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(focal_sums_on_gpu(given, FocalConstants(alpha=0.25, gamma=2.0)).losses)
        torch.cuda.synchronize()
        assert all(torch.equal(losses.cpu(), expected) for losses in found)


@pytest.mark.parametrize("blocks", [320, 340, 400, 480, 640, 1280, 1320])
def test_no_program_is_left_over_where_all_find_room(blocks):
    programs = blocks * -(-80 // steps_each(blocks, 80, room=1320))
    assert 900 <= programs <= 1320


@hypothesis.given(st.integers(1, 5000), st.integers(1, 2**31), st.integers(1, 3000))
def test_a_program_is_given_what_there_is_and_where_all_fit_as_much_as_can_be(blocks, steps, room):
    assert 1 <= steps_each(blocks, steps, room) <= steps
    assert steps_each(room, steps, room) == steps


@pytest.mark.parametrize(("blocks", "steps_given"), [(1, 1), (16, 1), (1400, 20)])
def test_few_blocks_are_shared_between_many_programs_and_many_blocks_cut(blocks, steps_given):
    assert steps_each(blocks, 80, room=1320) == steps_given


def test_a_loss_is_a_number_of_its_own(monkeypatch):
    monkeypatch.setattr(
        focal,
        "focal_sums",
        lambda grids, constants: focal_sums_on_gpu(list(map(flat, grids)), constants),
    )
    logits, labels = logits_and_labels((1, 3, 2, 2))
    loss = FocalLoss()(logits, labels)
    other = torch.ones((), device=DEVICE, requires_grad=True)
    loss += other  # as of a caller who adds up the terms of a loss
    loss.backward()
    assert other.grad == 1


def test_float64_and_odd_types_are_left_to_torch():
    logits, labels = logits_and_labels((1, 3, 2, 2))
    constants = FocalConstants(alpha=0.25, gamma=2.0)
    for given in (problem(logits.double(), labels), problem(logits, labels, dtype=torch.float16)):
        assert focal_sums_on_gpu([given], constants) is None
    assert focal_sums_on_gpu([], constants) is None


SIZES = ((6, 10), (3, 5), (1, 2))


def distances(made, *shape):
    """Returns distances of which few are negative, in no two rows the same."""
    return torch.rand(*shape, generator=made, dtype=torch.float64) * 20 - 1


def positives(formula, size, *, dtype=torch.float32, wide=None, share=0.7, layout="contiguous", seed=0):
    """Returns rows of a map, gradients and losses to be written over what is there."""
    made = torch.Generator().manual_seed(seed)
    cells = size[0] * size[1]
    images, places = torch.nonzero(torch.rand(2, cells, generator=made) < share, as_tuple=True)
    count, width = len(images), 1 if formula == RowFormula.CENTERNESS else 4
    preds, targets = distances(made, 2, width, *size), distances(made, count, width)
    if formula == RowFormula.CENTERNESS:
        preds, targets = preds - 9, (targets / 19).clamp(0, 1)
    if formula == RowFormula.GIOU:  # from the lower corner to the upper one
        preds[:, 2:] += preds[:, :2] + 2
        targets[:, 2:] += targets[:, :2] + 2
    preds = LAYOUTS[layout](preds.to(dtype))
    return RowGroup(
        preds=grid(preds).to(DEVICE),
        targets=targets.to(DEVICE, torch.float32),
        images=images.to(DEVICE),
        cells=places.to(DEVICE),
        factors=torch.rand(count, generator=made, dtype=torch.float64).to(DEVICE),
        gradient=grid(torch.zeros(preds.shape, dtype=wide or dtype, device=DEVICE)),
        scale=0.3,
        rows=torch.full((count,), 7.0, dtype=torch.float64, device=DEVICE),
    )


def row_by_definition(formula, pred, target):
    """Returns loss, slopes and extra of one row."""
    if formula == RowFormula.CENTERNESS:
        loss, slope = oracle.bce(pred[0], target[0])
        return loss, [slope], oracle.entropy(target[0])
    loss = {
        RowFormula.GIOU: oracle.giou_loss,
        RowFormula.GIOU_OF_LTRB: oracle.at_location(oracle.giou_loss, 2, 3, 8),
        RowFormula.LOG_IOU_OF_LTRB: oracle.log_iou_loss,
    }[formula]
    extra = float(min(pred) < 0) if formula != RowFormula.GIOU else 0.0
    return loss(pred, target), oracle.slope_of(loss, pred, target), extra


def check_rows(problems):
    """Compares what was written and added up with the definitions."""
    for formula, group, loss, extra in problems:
        total = np.zeros(2)
        expected = np.zeros(group.preds.shape)
        for row in range(len(group.targets)):
            at = (0, row) if group.cells is None else (int(group.images[row]), int(group.cells[row]))
            pred = group.preds[at[0], :, at[1]].cpu().double().tolist()
            value, slopes, more = row_by_definition(formula, pred, group.targets[row].tolist())
            factor = 1.0 if group.factors is None else float(group.factors[row])
            total += np.array([value, more]) * factor
            expected[at[0], :, at[1]] = np.array(slopes) * factor * group.scale
            if group.rows is not None:
                assert float(group.rows[row]) == pytest.approx(value * factor, rel=1e-12, abs=1e-12)
        assert [float(loss), float(extra)] == pytest.approx(total.tolist(), rel=1e-12, abs=1e-12)
        if group.gradient is not None:
            precision = PRECISION[group.gradient.dtype]
            oracle.assert_close(group.gradient.cpu(), expected, rtol=precision, atol=1e-7)


FORMULAS = tuple(RowFormula)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("wide", [torch.float32, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other column"])
def test_rows_of_every_formula_type_and_layout(formula, dtype, wide, layout):
    groups = [
        positives(formula, size, dtype=dtype, wide=wide, layout=layout, seed=i)
        for i, size in enumerate(SIZES)
    ]
    sums = row_sums_on_gpu(groups, formula, 1e-7)
    check_rows(zip([formula] * 3, groups, *sums, strict=True))


@pytest.mark.parametrize("formula", FORMULAS)
def test_rows_without_places_factors_or_gradients(formula):
    given = positives(formula, (20, 20), share=1.0)
    bare = RowGroup(preds=given.preds[:1], targets=given.targets[:400].double())
    check_rows([(formula, bare, *(each[0] for each in row_sums_on_gpu([bare], formula, 1e-7)))])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_head_in_two_launches(monkeypatch, share):
    grids = [problem(*logits_and_labels((2, 5, *size))) for size in SIZES]
    boxes, centerness = (
        [positives(formula, size, share=share) for size in SIZES]
        for formula in (RowFormula.GIOU_OF_LTRB, RowFormula.CENTERNESS)
    )
    constants = FocalConstants(alpha=0.25, gamma=2.0)
    arguments = (grids, constants, boxes, RowFormula.GIOU_OF_LTRB, centerness)
    found = []
    names = launches(monkeypatch, lambda: found.append(head_sums_on_gpu(*arguments)))
    assert names == ["focal_program", "rows_program"]
    cls, reg, entropies, negative_sides, floors = found[0].cpu()
    assert torch.equal(cls, solve(grids))
    check_rows(zip([RowFormula.GIOU_OF_LTRB] * 3, boxes, reg, negative_sides, strict=True))
    check_rows(zip([RowFormula.CENTERNESS] * 3, centerness, entropies, floors, strict=True))


@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_the_loss_of_a_head_by_the_programs(monkeypatch, preset):
    rng = np.random.default_rng(0)
    preds = oracle.head(rng, SIZES)
    targets = oracle.dense_targets(rng, SIZES)
    strides = (8, 16, 32)
    expected, slopes = oracle.fcos(
        *([[oracle.numpy_of(level) for level in maps] for maps in group] for group in (preds, targets)),
        preset=preset,
        strides=strides,
    )
    monkeypatch.setattr(
        fcos_terms,
        "focal_sums",
        lambda grids, constants: focal_sums_on_gpu(list(map(flat, grids)), constants),
    )
    monkeypatch.setattr(
        fcos_terms, "row_sums", lambda groups, formula: row_sums_on_gpu(groups, formula, 1e-7)
    )
    moved = [[level.detach().to(DEVICE).requires_grad_() for level in maps] for maps in preds]
    losses = FCOSLoss(3, preset=preset)(*moved, *([level.to(DEVICE) for level in maps] for maps in targets))
    losses["loss"].backward()
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-6)
    for maps, exact in zip(moved, slopes, strict=True):
        for level, slope in zip(maps, exact, strict=True):
            oracle.assert_close(level.grad.cpu(), slope, rtol=2e-6, atol=1e-8)


def test_groups_of_many_kinds_come_out_in_their_order():
    kinds = [(torch.float32, None), (torch.float16, torch.float32), (torch.float16, None)] * 2
    groups = [
        positives(RowFormula.CENTERNESS, (1, 3), dtype=d, wide=w, seed=i) for i, (d, w) in enumerate(kinds)
    ]
    groups += [positives(RowFormula.CENTERNESS, (1, 3), seed=i) for i in range(34)]
    check_rows(
        zip(
            [RowFormula.CENTERNESS] * 40,
            groups,
            *row_sums_on_gpu(groups, RowFormula.CENTERNESS, 1e-7),
            strict=True,
        )
    )


def test_nan_in_a_row_is_seen_in_its_loss():
    preds = torch.tensor([[[1.0, float("nan")]] * 4], device=DEVICE)
    for formula in FORMULAS[:3]:
        rows = torch.zeros(2, dtype=torch.float64, device=DEVICE)
        row_sums_on_gpu(
            [RowGroup(preds=preds, targets=torch.ones(2, 4, device=DEVICE), rows=rows)], formula, 1e-7
        )
        assert rows.isnan().tolist() == [False, True]


def test_rows_of_float64_are_left_to_torch():
    group = positives(RowFormula.GIOU, (2, 2), dtype=torch.float64)
    assert row_sums_on_gpu([group], RowFormula.GIOU, 1e-7) is None
    assert row_sums_on_gpu([], RowFormula.GIOU, 1e-7) is None
    logits = [problem(*logits_and_labels((1, 2, 2, 2)))]
    constants = FocalConstants(alpha=0.25, gamma=2.0)
    assert head_sums_on_gpu(logits, constants, [group], RowFormula.GIOU, []) is None


def test_every_program_can_be_compiled_ahead():
    compile_programs(DEVICE)
    assert library.loaded_programs() is not None


def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch):
    from lossd_server.losses.gpu import programs

    class Broken:
        def __getitem__(self, _count):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(library, "_loaded", [programs])
    monkeypatch.setattr(library, "_given_up", Event())
    monkeypatch.setattr(programs, "focal_program", Broken())
    with pytest.warns(RuntimeWarning, match="no GPU kernels, slower ones are used: no compiler"):
        compile_programs(DEVICE)
    assert load_programs(DEVICE) is None
    assert (
        focal_sums_on_gpu([problem(*logits_and_labels((1, 2, 2, 2)))], FocalConstants(alpha=0.25, gamma=2.0))
        is None
    )


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
import torch
from lossd_server.losses.gpu import load_programs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert load_programs(torch.device("cpu")) is None
    assert load_programs(torch.device("cpu")) is None
print(len(caught), caught[0].message)
"""

SHAPES_ON_A_GPU_THAT_IS_NOT_THERE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
run = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **constants: run(self, *args, warmup=True, **constants)

from lossd_server.losses.focal import count_objects_on_gpu
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.row_group import RowGroup
from lossd_server.losses.gpu import focal_sums_on_gpu, load_programs, row_sums_on_gpu

programs = load_programs(torch.device("cpu"))
for shape in ((1, 80, 169), (2, 80, 10000), (3, 1, 1), (16, 8, 64), (1, 7, 13)):
    logits, gradient = torch.zeros(shape), torch.zeros(shape)
    for labels in (torch.int32, torch.int64):
        where = torch.zeros(shape[0], shape[2], dtype=labels)
        for rows, ignored in ((None, None), (torch.zeros(where.shape), where.bool())):
            grid = FocalGrid(
                logits=logits, labels=where, background=True, gradient=gradient, rows=rows, ignored=ignored
            )
            for gamma in (2.0, 0.0, 1.5):
                constants = FocalConstants(alpha=None, gamma=gamma)
                assert focal_sums_on_gpu([grid] * len(shape), constants) is not None
    for width, formula in ((4, RowFormula.GIOU), (4, RowFormula.LOG_IOU_OF_LTRB), (1, RowFormula.CENTERNESS)):
        preds = torch.zeros(1, width, shape[2])
        group = RowGroup(
            preds=preds, targets=torch.zeros(shape[2], width), gradient=torch.zeros_like(preds)
        )
        assert row_sums_on_gpu([group], formula, 1e-7) is not None
for program in (programs.focal_program, programs.rows_program, programs.zero_program):
    kernels = [kernel for cache in program.device_caches.values() for kernel in cache[0].values()]
    print(len(kernels), "cubin" in kernels[0].asm)
"""


def run(program, **environment):
    """Runs a program in a process of its own, where Triton is not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    environment.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.strip()


def test_without_triton_it_is_said_once():
    assert run(WITHOUT_TRITON).startswith("1 no GPU kernels, slower ones are used")


def test_no_shape_is_compiled_for_and_the_cache_is_where_ours_is(tmp_path):
    assert run(SHAPES_ON_A_GPU_THAT_IS_NOT_THERE, LOSSD_CACHE_DIR=str(tmp_path)).split("\n") == [
        "2 True",
        "1 True",
        "1 True",
    ]
    assert list((tmp_path / "lossd" / "triton").rglob("*.cubin"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_are_counted_where_they_lie(dtype):
    labels = torch.tensor([[3, -1, 0], [2, 3, -1]], dtype=dtype, device=DEVICE)
    assert count_objects_on_gpu(labels, 4) == 4
    assert count_objects_on_gpu(labels, 3) is None
    assert count_objects_on_gpu(labels - 1, 4) is None
    assert count_objects_on_gpu(labels[:0], 4) is None


@needs_gpu
def test_a_label_out_of_range_is_refused_by_its_place():
    labels = torch.tensor([0, 7, 1], device=DEVICE)
    with pytest.raises(InvalidInputError, match=r"label at \[1\] is 7, want -1..2"):
        FocalLoss()(torch.zeros(3, 3, device=DEVICE), labels)


@needs_gpu
def test_losses_on_the_gpu_are_those_on_the_cpu():
    logits, labels = logits_and_labels((2, 80, 13, 17))
    options = EvaluationOptions(gradients=("inputs",))
    loss = FocalLoss()
    gpu, cpu = (
        loss.evaluate(loss.prepare({"inputs": logits.to(place), "targets": labels.to(place)}), options)
        for place in (DEVICE, "cpu")
    )
    torch.testing.assert_close(gpu.loss.cpu(), cpu.loss, rtol=2e-7, atol=0)
    torch.testing.assert_close(gpu.gradients["inputs"].cpu(), cpu.gradients["inputs"], rtol=1e-6, atol=1e-38)


@contextmanager
def waiting_forbidden():
    """Lets torch raise where the host would wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not see every way to wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_nothing_waits_for_the_gpu():
    grids = [problem(*logits_and_labels((2, 5, *size))) for size in SIZES]
    boxes, centerness = (
        [positives(formula, size) for size in SIZES]
        for formula in (RowFormula.GIOU_OF_LTRB, RowFormula.CENTERNESS)
    )
    constants = FocalConstants(alpha=0.25, gamma=2.0)
    arguments = (grids, constants, boxes, RowFormula.GIOU_OF_LTRB, centerness)
    head_sums_on_gpu(*arguments)
    with waiting_forbidden():
        head_sums_on_gpu(*arguments)


@needs_gpu
def test_a_head_on_the_gpu_is_that_on_the_cpu():
    rng = np.random.default_rng(0)
    preds = oracle.head(rng, SIZES, requires_grad=False)
    targets = oracle.dense_targets(rng, SIZES)
    values = [
        FCOSLoss(3)(*([[level.to(place) for level in maps] for maps in (*preds, *targets)]))["loss"].cpu()
        for place in (DEVICE, "cpu")
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
