"""The benchmark runs, writes what it reads back, and compares with the right thing; no time is asserted."""

import io
import json
import math

import grpc
import numpy as np
import pytest
import torch
from rich.console import Console

from lossd_server.bench import inputs, memory, option_cases, reference, runner, timing
from lossd_server.bench.cases import CASES, select
from lossd_server.bench.child import Child
from lossd_server.bench.echo import METHOD, SERVERS, EchoProcess
from lossd_server.bench.loss_cases import evaluate
from lossd_server.bench.report import from_json, to_json
from lossd_server.bench.timing import QUICK, measure, summarise
from lossd_server.errors import ConfigurationError, InvalidInputError
from lossd_server.losses import CenternessLoss, FCOSLoss, FocalLoss, GIoULoss
from lossd_server.targets import DEFAULT_STRIDES, FCOSAssigner, feature_sizes

SIZES = feature_sizes((160, 224), DEFAULT_STRIDES)
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def malloc_left_alone(monkeypatch):
    """The thresholds would stay raised for every later test of this process."""
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: False)


def quick_run(names, **options):
    text = io.StringIO()
    runner.run(names=names, quick=True, console=Console(file=text), **options)
    return text.getvalue()


def with_gradients(loss, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_agree(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_focal_reference_agrees(dtype):
    logits, labels = inputs.logits_and_labels((2, 5, 7, 3))
    logits = logits.to(dtype)
    expected = with_gradients(lambda leaf: reference.focal_loss(leaf, labels), [logits])
    assert_agree(evaluate(FocalLoss(), {"inputs": logits, "targets": labels}, gradients=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_giou_reference_agrees(dtype):
    pred, target = (boxes.to(dtype) for boxes in inputs.box_pairs(50))
    expected = with_gradients(lambda leaf: reference.giou_loss(leaf, target), [pred])
    arguments = {"pred_boxes": pred, "target_boxes": target}
    assert_agree(evaluate(GIoULoss(), arguments, gradients=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_centerness_reference_agrees(dtype):
    pred, target = (values.to(dtype) for values in inputs.centerness_pairs(50))
    expected = with_gradients(lambda leaf: reference.centerness_loss(leaf, target), [pred])
    assert_agree(evaluate(CenternessLoss(), {"pred": pred, "target": target}, gradients=True), expected)


def head(dtype):
    outputs = inputs.head_outputs(2, SIZES)
    preds = reference.Predictions(*([level.to(dtype) for level in kind] for kind in outputs))
    images = [inputs.boxes_and_labels(count, (160, 224), seed=count) for count in (0, 12)]
    boxes, labels = ([*kind] for kind in zip(*images, strict=True))
    return preds, [image.to(dtype) for image in boxes], labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["autotimm", "documented"])
def test_fcos_reference_agrees(dtype, preset):
    preds, boxes, labels = head(dtype)
    levels = len(SIZES)
    dense = reference.assign_batch(boxes, labels, SIZES)
    assert any((level.cls >= 0).any() for level in dense)

    def split(leaves):
        return reference.Predictions(*(list(leaves[i * levels : (i + 1) * levels]) for i in range(3)))

    if preset == "autotimm":
        columns = [list(column) for column in zip(*dense, strict=True)]
        targets = dict(zip(("cls_targets", "reg_targets", "centerness_targets"), columns, strict=True))

        def eager(*leaves):
            return reference.fcos_autotimm(split(leaves), dense)
    else:
        targets = {"ground_truth": [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]}

        def eager(*leaves):
            return reference.fcos_documented(split(leaves), boxes, labels)

    loss = FCOSLoss(inputs.CLASSES)
    named = dict(zip(loss.differentiable, preds, strict=True))
    found = evaluate(loss, {**named, **targets}, gradients=True)
    leaves = [level for kind in preds for level in kind]
    assert_agree(found, with_gradients(eager, leaves))


def test_all_pairs_reference_agrees():
    objects = [inputs.boxes_and_labels(count, (800, 1333), seed=count) for count in (0, 1, 60)]
    sizes = feature_sizes((800, 1333), DEFAULT_STRIDES)
    boxes, labels = ([*kind] for kind in zip(*objects, strict=True))
    expected = reference.assign_batch(boxes, labels, sizes)
    ground_truth = [{"boxes": b, "labels": c} for b, c in objects]
    found = FCOSAssigner().assign(ground_truth, sizes).dense()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.cls, other.cls)
        np.testing.assert_array_equal(one.reg, other.reg)
        # torch's float32 square root is not always the nearest number; numpy's is.
        np.testing.assert_allclose(one.centerness, other.centerness, rtol=2e-7)


def test_a_run_writes_what_compare_reads(tmp_path):
    first = tmp_path / "first.json"
    printed = quick_run(["focal-S", "assign-20"], json_path=first)
    assert "\x1b" not in printed
    assert "…" not in printed
    assert [line.split(":")[0] for line in printed.splitlines()[:2]] == ["focal-S", "assign-20"]

    report = from_json(first.read_text())
    assert to_json(report) == first.read_text()
    assert [case.name for case in report.cases] == ["focal-S", "assign-20"]
    focal, assign = report.cases
    assert [path.name for path in focal.paths] == ["eager", "lossd", "module", "copy"]
    assert all(path.median > 0 and path.count >= QUICK.least_rounds for path in focal.paths)
    assert focal.path("lossd").value_error < 1e-5
    assert focal.path("lossd").gradient_error < 1e-5
    assert focal.path("copy").value_error is None
    assert assign.path("lossd").value_error == 0

    again = quick_run(["focal-S"], json_path=None, compare=first)
    assert f"before: {report.environment.date}" in again
    assert "before / it" in again


def test_malloc_keeps_freed_memory_unless_it_is_to_be_plain(monkeypatch):
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: True)
    assert "malloc thresholds raised" in quick_run(["assign-20"])
    assert "malloc as it is" in quick_run(["assign-20"], plain_malloc=True)


def test_calls_of_a_server_in_a_child_process(tmp_path):
    file = tmp_path / "rpc.json"
    quick_run(["rpc-S"], json_path=file)
    (case,) = from_json(file.read_text()).cases
    assert [path.name for path in case.paths] == [
        "evaluate",
        "engine",
        "allocated",
        "shared",
        "rpc",
        "apart",
        "bfloat16",
        "float16",
        "stock",
        "bare",
        "open",
        "copy",
    ]
    for name in ("allocated", "shared", "rpc", "apart", "stock"):
        assert case.path(name).gradient_error == case.path("evaluate").gradient_error
    for name in ("bfloat16", "float16"):
        assert 1e-4 < case.path(name).gradient_error < 1e-2
        assert case.path(name).value_error < 1e-2


def test_choices_of_grpc_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(option_cases, "_SIZES", dict.fromkeys(option_cases._SIZES, 1_024))
    file = tmp_path / "options.json"
    quick_run(["options-L", "channels-L", "channels-beside", "servers-callers"], json_path=file)
    options, channels, beside, servers = from_json(file.read_text()).cases
    assert [path.name for path in options.paths] == [*SERVERS][:-1]
    assert [path.name for path in channels.paths] == ["1 connection", "2 connections", "4 connections"]
    assert [path.name for path in beside.paths] == ["same connection", "another"]
    assert [path.name for path in servers.paths] == ["threads", "asyncio"]


def test_echoes_answer_with_what_they_are_sent():
    echoes = EchoProcess()
    try:
        for name, address in echoes.addresses.items():
            with grpc.insecure_channel(address, options=SERVERS[name].client_options) as channel:
                assert channel.unary_unary(METHOD)(b"what") == b"what"
    finally:
        echoes.stop()
    assert echoes._process.returncode == 0


def test_the_child_ends():
    child = Child.start("cpu")
    child.stop()
    assert child.process.returncode == 0


def test_names_of_cases():
    names = [spec.name for spec in CASES]
    assert len(set(names)) == len(names)
    assert {spec.name for spec in select(["focal"], quick=False)} == {
        "focal-images",
        *(f"focal{kind}-{size}" for kind in ("", "-value") for size in "SML"),
    }
    assert not any(spec.large for spec in select([], quick=True))
    assert [spec.name for spec in select(["focal-L"], quick=True)] == ["focal-L"]
    with pytest.raises(InvalidInputError, match="focal-XL"):
        select(["focal-XL"], quick=False)


def test_real_objects_are_measured_where_there_are_some():
    assert "assign-coco" not in {spec.name for spec in select(["assign"], quick=False)}
    assert "assign-coco" in {spec.name for spec in select(["assign"], quick=False, coco=True)}
    with pytest.raises(InvalidInputError, match="assign-coco needs --coco"):
        select(["assign-coco"], quick=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": 99})])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match="report"):
        quick_run(["focal-S"], json_path=None, compare=file)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError):
        quick_run(["focal-S"], device="nowhere")


def test_calls_are_timed_in_turn_and_some_in_a_row(monkeypatch):
    for limit in ("_ROW_SECONDS", "_LONG_SECONDS"):  # whatever else this machine does meanwhile
        monkeypatch.setattr(timing, limit, math.inf)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = measure(calls, QUICK, torch.device("cpu"))
    row = 1 + QUICK.most_in_a_row
    rounds = (len(order) - 2) // (2 * row)
    assert rounds >= QUICK.least_rounds
    assert order == ["a", "b"] + (["a"] * row + ["b"] * row) * rounds
    assert timings["a"].count == timings["b"].count == rounds * QUICK.most_in_a_row


def test_long_calls_are_not_made_twice_in_a_row(monkeypatch):
    monkeypatch.setattr(timing, "_LONG_SECONDS", 0.0)
    order = []
    found = measure({"long": lambda: order.append(1)}, QUICK, torch.device("cpu"))["long"]
    assert found.count == len(order) - 1
    assert found.first is None


def test_a_row_ends_after_some_time(monkeypatch):
    monkeypatch.setattr(timing, "_ROW_SECONDS", 0.0)
    order = []
    found = measure({"call": lambda: order.append(1)}, QUICK, torch.device("cpu"))["call"]
    assert found.count == (len(order) - 1) / 2


def test_quartiles_are_of_calls_that_follow_their_like():
    found = summarise([[9.0, 4.0, 1.0], [7.0, 3.0], [8.0, 2.0, 5.0]])
    assert (found.lower, found.median, found.upper, found.count) == (2.0, 3.0, 4.0, 5)
    assert found.first == 8.0
    alone = summarise([[2.0]])
    assert (alone.median, alone.count, alone.first) == (2.0, 1, None)


def test_peak_memory_sees_what_a_call_takes():
    peak = memory.peak_extra_bytes(lambda: np.ones(4 << 20), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not say")
    assert 30 << 20 < peak < 60 << 20
