"""The compiled kernel gives what torch gives, only sooner; and without it nothing is missing."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd_server.kernels import load_library
from lossd_server.losses import EvaluationOptions, FocalLoss
from tests.domain.support import evaluated, needs_a_compiler, without_kernels

pytestmark = needs_a_compiler


@pytest.fixture(autouse=True)
def _kernel():
    assert load_library() is not None


def evaluate(logits, targets, *, normalizer=None, dtype=None, **settings):
    options = EvaluationOptions(gradients=("inputs",), normalizer=normalizer, gradient_dtype=dtype)
    return evaluated(FocalLoss(**settings), {"inputs": logits, "targets": targets}, options)


def grid(batch=2, classes=7, height=9, width=13, scale=4.0, seed=0):
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, height, width, generator=made) * scale
    return logits, torch.randint(-1, classes, (batch, height, width), generator=made)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "some of the images": lambda x: torch.cat([x, x]).as_strided(x.shape, (2 * x.stride(0), *x.stride()[1:])),
    "transposed maps": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("gamma", [0, 1, 2, 3, 4, 1.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_torch(layout, gamma):
    logits, targets = grid()
    logits = LAYOUTS[layout](logits)
    ours = evaluate(logits, targets, gamma=gamma)
    torchs = without_kernels(lambda: evaluate(logits, targets, gamma=gamma))
    torch.testing.assert_close(ours.loss, torchs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.gradients["inputs"], torchs.gradients["inputs"], rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("layout", ["rows", "classes"])
def test_it_agrees_with_torch_on_rows(layout):
    logits = torch.randn(300, 21)
    logits = logits if layout == "rows" else logits.t().contiguous().t()
    targets = torch.randint(-1, 21, (300,))
    ours, torchs = evaluate(logits, targets), without_kernels(lambda: evaluate(logits, targets))
    torch.testing.assert_close(ours.gradients["inputs"], torchs.gradients["inputs"], rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = grid()
    half = evaluate(logits.to(dtype), targets, dtype=torch.float32)
    wide = evaluate(logits.to(dtype).float(), targets)
    assert torch.equal(half.loss, wide.loss)
    assert torch.equal(half.gradients["inputs"], wide.gradients["inputs"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_gradients_of_any_layout(layout, dtype):
    logits, targets = grid()
    half = evaluate(LAYOUTS[layout](logits), targets, dtype=dtype).gradients["inputs"]
    wide = evaluate(LAYOUTS[layout](logits), targets).gradients["inputs"]
    torch.testing.assert_close(half, wide.to(dtype), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_of_rows_with_gaps(dtype):
    logits, targets = torch.randn(50, 14)[:, :7], torch.randint(-1, 7, (50,))
    half = evaluate(logits, targets, dtype=dtype).gradients["inputs"]
    assert torch.equal(half, evaluate(logits, targets).gradients["inputs"].to(dtype))


@settings(deadline=None, max_examples=60)
@given(shape=st.tuples(*[st.integers(0, n) for n in (3, 40, 20, 60)]), seed=st.integers(0, 9))
def test_every_shape_is_served(shape, seed):
    logits, targets = (
        grid(*shape, seed=seed)
        if shape[1]
        else (torch.zeros(shape), -torch.ones(shape[:1] + shape[2:]).long())
    )
    rows = evaluate(logits, targets, reduction="sum")
    each = sum(
        float(evaluate(logits[i : i + 1], targets[i : i + 1], reduction="sum").loss) for i in range(shape[0])
    )
    assert float(rows.loss) == pytest.approx(each, rel=1e-6)
    assert not rows.gradients["inputs"][(targets < 0).unsqueeze(1).expand_as(logits)].any()


def test_bits_do_not_depend_on_threads_place_or_company():
    logits, targets = grid(3, 80, 50, 60)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluate(logits, targets, normalizer=7.0)
        torch.set_num_threads(2)
        two = evaluate(logits, targets, normalizer=7.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.gradients["inputs"], two.gradients["inputs"])
    alone = evaluate(logits[1:2, :, 7:, :], targets[1:2, 7:], normalizer=7.0)
    assert torch.equal(alone.gradients["inputs"], one.gradients["inputs"][1:2, :, 7:])


def test_extreme_logits_stay_finite_and_nan_stays_in_its_cell():
    logits = torch.tensor([[300.0, -300.0, 3e38, -3e38, 1e-40, float("nan")]])
    gradient = evaluate(logits.expand(2, 6).clone(), torch.tensor([0, 1]), reduction="sum").gradients[
        "inputs"
    ]
    assert torch.isfinite(gradient[:, :5]).all()
    assert gradient[:, 5].isnan().all()


def test_nan_of_any_bits_stays_in_its_cell():
    bits = torch.tensor([[0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000]], dtype=torch.int32)
    gradient = evaluate(bits.view(torch.float32), torch.tensor([0])).gradients["inputs"]
    assert gradient.isnan().all()


LABEL_TYPES = [
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", LABEL_TYPES)
def test_labels_of_every_integer_type_are_read_as_they_lie(dtype):
    classes = 127 if dtype is torch.int8 else 250  # beyond the sign of a byte
    logits = torch.randn(1, classes, 8, 9)
    targets = torch.arange(72).reshape(1, 8, 9) * (classes - 1) // 71
    ours, wide = evaluate(logits, targets.to(dtype)), evaluate(logits, targets)
    assert torch.equal(ours.loss, wide.loss)
    assert torch.equal(ours.gradients["inputs"], wide.gradients["inputs"])


@pytest.mark.parametrize("share", ["few", "most"])
@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_it_sees_nan_and_infinity_wherever_they_are(layout, stray, share):
    """Also where no row takes part, and in tasks that compute few of their cells."""
    logits, targets = grid(2, 7, 50, 60)
    targets[:] = -1
    targets[0, 0, : 20 if share == "few" else 60] = 1
    if share == "most":
        targets[:] = 1
        targets[1, 20] = -1
    assert evaluate(LAYOUTS[layout](logits), targets).finite_inputs == {"inputs"}
    logits[1, 6, 20, 30] = stray
    assert not evaluate(LAYOUTS[layout](logits), targets).finite_inputs


def test_a_gradient_goes_where_the_caller_wants_it():
    logits, targets = grid()
    place = torch.full_like(logits, 7.0)
    options = EvaluationOptions(gradients=("inputs",), outputs={"inputs": [place]})
    evaluation = evaluated(FocalLoss(), {"inputs": logits, "targets": targets}, options)
    assert evaluation.gradients["inputs"] is place
    assert torch.equal(place, evaluate(logits, targets).gradients["inputs"])


def test_the_mode_of_the_processor_is_left_as_it_was():
    evaluate(*grid())
    assert torch.tensor([1e-40]).mul(2).item() > 0


def run(program, **environment):
    """Runs a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


LOAD = "from lossd_server.kernels import load_library; assert load_library()"


USE = """
import torch
from lossd_server.losses import FocalLoss
for _ in range(3):
    print(FocalLoss()(torch.zeros(2, 3), torch.tensor([0, 1])).item())
"""


@pytest.mark.parametrize("compiler", [{"PATH": "/nowhere", "CC": ""}, {"CC": "false"}])
def test_without_a_compiler_that_works_it_says_so_once_and_computes(tmp_path, compiler):
    done = run(USE, LOSSD_CACHE_DIR=str(tmp_path), **compiler)
    assert done.stderr.count("no compiled kernels") == 1
    assert done.stdout.count("0.3") == 3


def test_what_the_compiler_says_is_told(tmp_path):
    compiler = tmp_path / "cc"  # like a linker that fails, it leaves nothing of what was to be its output
    compiler.write_text(
        '#!/bin/sh\nrm "$(echo "$*" | sed "s/.*-o //; s/ .*//")"\necho boom: no room >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    done = run(USE, LOSSD_CACHE_DIR=str(tmp_path), CC=str(compiler))
    assert "no compiled kernels, slower ones are used: boom: no room" in done.stderr
    assert not list((tmp_path / "lossd").iterdir())


def test_a_kernel_is_kept_for_the_next_process(tmp_path):
    run(LOAD, LOSSD_CACHE_DIR=str(tmp_path))
    (kernel,) = (tmp_path / "lossd").iterdir()
    made = kernel.stat().st_mtime_ns
    run(LOAD, LOSSD_CACHE_DIR=str(tmp_path))
    assert kernel.stat().st_mtime_ns == made


def test_a_cache_that_others_can_write_to_is_not_trusted(tmp_path):
    shared = tmp_path / "lossd"
    shared.mkdir()
    shared.chmod(0o777)
    run(LOAD, LOSSD_CACHE_DIR=str(tmp_path))
    assert not list(shared.iterdir())
