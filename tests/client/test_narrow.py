"""Narrow types by the client's choice, and narrow labels by themselves."""

import asyncio
from contextlib import aclosing

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd.narrow import narrowed_integers
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.writing import placed
from lossd_client import (
    AsyncClient,
    Client,
    CustomLoss,
    FCOSAssigner,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    InvalidInputError,
    _storage,
)
from lossd_client._wire_form import WireForm
from lossd_client.torch import RemoteLoss
from tests.client.support import FCOS, SIMPLE, same_bits
from tests.service.support import boxes, focal_grid_arrays, make_server

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WIRE_TYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
LOGITS, LABELS = focal_grid_arrays(np.random.default_rng(0), 6).values()


def cast(value, dtype):
    if isinstance(value, list):
        return [cast(entry, dtype) for entry in value]
    return value.astype(dtype)


def flat(value):
    return [entry for part in value for entry in flat(part)] if isinstance(value, list) else [value]


def assert_as_if_rounded(client, case, result, arguments, wire):
    """The result is that of rounded predictions, with bfloat16 gradients widened to the caller's type."""
    names = [] if case.config.kind == "giou" else case.config.differentiable
    rounded = [
        cast(argument, wire) if name in names else argument
        for name, argument in zip(case.names, arguments, strict=True)
    ]
    expected = client.compute_loss(case.config, *rounded, gradients=True, gradient_dtype=BFLOAT16)
    assert result.components == expected.components
    assert float(result.loss.sum()) == float(expected.loss.astype(result.loss.dtype).sum())
    given = dict(zip(case.names, arguments, strict=True))
    for name, gradient in expected.gradients.items():
        pairs = zip(flat(result.gradients[name]), flat(gradient), flat(given[name]), strict=True)
        for found, narrow, argument in pairs:
            assert narrow.dtype == BFLOAT16
            assert same_bits(found, narrow.astype(argument.dtype))
            assert not found.flags.writeable


@pytest.mark.parametrize("case", [*SIMPLE.values(), *FCOS.values()], ids=[*SIMPLE, *FCOS])
@pytest.mark.parametrize("wire", WIRE_TYPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_are_rounded_and_gradients_widened(client, case, wire, dtype):
    arguments = [
        cast(argument, dtype) if name in case.config.differentiable else argument
        for name, argument in zip(case.names, case.arguments(), strict=True)
    ]
    result = client.compute_loss(case.config, *arguments, gradients=True, wire_dtype=wire)
    assert_as_if_rounded(client, case, result, arguments, WIRE_TYPES[wire])
    assert result.loss.dtype == dtype
    plain = client.compute_loss(case.config, *arguments)
    assert float(result.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=2e-2)


@pytest.mark.parametrize("wire", [BFLOAT16, ml_dtypes.bfloat16, "bfloat16", torch.bfloat16])
def test_spellings_of_a_type(client, wire):
    found = client.compute_loss(FocalLoss(), LOGITS, LABELS, wire_dtype=wire)
    assert found.loss == client.compute_loss(FocalLoss(), LOGITS.astype(BFLOAT16), LABELS).loss


@pytest.mark.parametrize("wire", ["float32", np.int8, "half", torch.float64, 3])
def test_other_types_are_refused(client, wire):
    with pytest.raises(InvalidInputError, match=r"wire_dtype: is .*, want float16 or bfloat16") as caught:
        client.compute_loss(FocalLoss(), LOGITS, LABELS, wire_dtype=wire)
    assert caught.value.reason == "INVALID_OPTION"
    assert client.compute_loss(FocalLoss(), LOGITS, LABELS).loss > 0


def test_the_type_that_gradients_are_wanted_in(client):
    found = client.compute_loss(
        FocalLoss(), LOGITS, LABELS, gradients=True, gradient_dtype=np.float64, wire_dtype="bfloat16"
    )
    assert found.gradients["inputs"].dtype == np.float64
    for wrong in (np.int8, np.bool_):
        with pytest.raises(InvalidInputError, match=r"gradient_dtype: is .*, want a float type"):
            client.compute_loss(
                FocalLoss(), LOGITS, LABELS, gradients=True, gradient_dtype=wrong, wire_dtype="bfloat16"
            )


def test_what_is_narrow_already_stays_as_it_is(client):
    half = LOGITS.astype(np.float16)
    found = client.compute_loss(FocalLoss(), half, LABELS, gradients=True, wire_dtype="bfloat16")
    plain = client.compute_loss(FocalLoss(), half, LABELS, gradients=True)
    assert found.loss == plain.loss
    assert found.gradients["inputs"].dtype == np.float16


@pytest.mark.parametrize(("wire", "value"), [("float16", 7e4), ("float16", -1e30), ("bfloat16", -3.4e38)])
def test_a_number_beyond_the_type_is_refused(client, wire, value):
    logits = LOGITS.copy()
    logits[1, 2, 3, 4] = value
    logits[0, 0, 0, :2] = np.nan, np.inf
    with pytest.raises(InvalidInputError) as caught:
        client.compute_losses(FocalLoss(), [(LOGITS, LABELS), (logits, LABELS)], wire_dtype=wire)
    error = caught.value
    assert (error.reason, error.field) == ("VALUE_OUT_OF_RANGE", "items[1].focal.inputs")
    assert f"value at [1, 2, 3, 4] is {value:g}, {wire} holds at most" in error.message
    assert error.metadata["position"] == "[1, 2, 3, 4]"


def test_what_is_not_finite_is_sent_as_such(client):
    logits = LOGITS.copy()
    logits[1, 2, 3, 4], logits[0, 1, 0, 0] = np.inf, np.nan
    for wire in WIRE_TYPES:
        (found,) = client.compute_loss(FocalLoss(), logits, LABELS, wire_dtype=wire).non_finite
        assert (found.count, found.first_index) == (2, (0, 1, 0, 0))
    largest = np.full_like(LOGITS, 65519)  # rounds to 65504
    assert not client.compute_loss(FocalLoss(), largest, LABELS, wire_dtype="float16").non_finite


def test_corners_are_sent_as_they_are(client):
    rng = np.random.default_rng(0)
    pred, target = boxes(rng, 5) + 1000, boxes(rng, 5) + 1000
    found = client.compute_loss(GIoULoss(), pred, target, gradients=True, wire_dtype="bfloat16")
    plain = client.compute_loss(GIoULoss(), pred, target, gradients=True)
    assert found.loss == plain.loss
    np.testing.assert_allclose(found.gradients["pred_boxes"], plain.gradients["pred_boxes"], rtol=2**-8)


def test_a_custom_loss_is_sent_as_it_is(client):
    with pytest.raises(InvalidInputError, match="wire_dtype: does not go with a custom loss") as caught:
        client.compute_loss(CustomLoss("Squared"), {"pred": np.ones(2)}, wire_dtype="float16")
    assert caught.value.reason == "UNEXPECTED_FIELD"


def test_a_batch_in_several_messages(small_target):
    rng = np.random.default_rng(0)
    items = [
        (rng.standard_normal((rows, 5)).astype(dtype), rng.integers(0, 5, rows))
        for rows, dtype in ((50_000, np.float32), (60_000, np.float64), (40_000, np.float32))
    ]
    with Client(small_target) as client:
        results = client.compute_losses(FocalLoss(), items, gradients=True, wire_dtype="bfloat16")
    for result, (logits, _) in zip(results, items, strict=True):
        assert result.loss.dtype == logits.dtype
        assert result.gradients["inputs"].dtype == logits.dtype
        assert result.gradients["inputs"].shape == logits.shape


@pytest.mark.parametrize("case", [SIMPLE["focal-grid-mean"], FCOS["fcos-dense-default"]])
def test_every_way_to_call(client, target, case):
    arguments = case.arguments()
    settings = {"gradients": True, "wire_dtype": "bfloat16"}
    results = [*client.compute_loss_stream(case.config, [arguments] * 3, **settings)]

    async def asynchronously():
        async with AsyncClient(target) as other:
            found = [await other.compute_loss(case.config, *arguments, **settings)]
            found += await other.compute_losses(case.config, [arguments], **settings)
            stream = other.compute_loss_stream(case.config, [arguments] * 2, **settings)
            async with aclosing(stream) as answers:
                return found + [answer async for answer in answers]

    results += asyncio.run(asynchronously())
    assert len(results) == 7
    for result in results:
        assert_as_if_rounded(client, case, result, arguments, BFLOAT16)


def test_on_a_stream_a_number_beyond_the_type_ends_nothing_else(client):
    bad = np.full_like(LOGITS, 1e6)
    items = [(LOGITS, LABELS), (bad, LABELS), (LOGITS, LABELS)]
    stream = client.compute_loss_stream(FocalLoss(), items, wire_dtype="float16", return_exceptions=True)
    first, error, last = stream
    assert isinstance(error, InvalidInputError)
    assert error.field == "items[1].focal.inputs"
    assert first.loss == last.loss


def test_through_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_storage, "LEAST_BYTES", 1)
    path = tmp_path / "lossd.sock"
    with make_server(listen=(f"unix:{path}",)) as server, Client(server.addresses[0]) as client:
        for case in (SIMPLE["focal-grid-mean"], FCOS["fcos-dense-default"]):
            arguments = case.arguments()
            for wire, dtype in WIRE_TYPES.items():
                result = client.compute_loss(case.config, *arguments, gradients=True, wire_dtype=wire)
                assert_as_if_rounded(client, case, result, arguments, dtype)
        logits = client.allocate(LOGITS.shape)
        logits[:] = LOGITS
        found = client.compute_loss(FocalLoss(), logits, LABELS, gradients=True, wire_dtype="bfloat16")
        assert found.loss == client.compute_loss(FocalLoss(), LOGITS, LABELS, wire_dtype="bfloat16").loss
        assert same_bits(np.asarray(logits), LOGITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_trainer_changes_one_argument(client, dtype):
    gradients = []
    for wire in (None, "bfloat16"):
        leaf = torch.from_numpy(LOGITS).to(dtype).requires_grad_()
        loss = RemoteLoss(client, FocalLoss(), wire_dtype=wire)(leaf, torch.from_numpy(LABELS))
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        (loss * 1024).backward()
        assert leaf.grad.dtype == dtype
        gradients.append(leaf.grad.double())
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-3 * float(gradients[0].abs().max()))


@pytest.mark.parametrize(
    ("lowest", "highest", "dtype", "narrow"),
    [
        (-1, 79, np.int64, np.int8),
        (-128, 127, np.int32, np.int8),
        (-1, 128, np.int64, np.int16),
        (-(2**15), 2**15 - 1, np.int32, np.int16),
        (-1, 2**15, np.int64, np.int64),
        (-1, 3, np.int16, np.int8),
        (-1, 3, np.int8, np.int8),
        (0, 3, np.uint64, np.uint64),
        (0, 3, np.float64, np.float64),
    ],
)
def test_labels_go_in_the_smallest_type(lowest, highest, dtype, narrow):
    labels = np.full(20_000, lowest, dtype)
    labels[1234] = highest
    found = narrowed_integers(labels)
    assert found.dtype == narrow
    np.testing.assert_array_equal(found, labels)
    few = labels[:2]
    assert narrowed_integers(few) is few


def test_narrow_labels_change_nothing(client, monkeypatch):
    rng = np.random.default_rng(0)
    case = FCOS["fcos-truth-default"]
    results = []
    calls = [
        (FocalLoss(), (rng.standard_normal((3000, 4), np.float32), rng.integers(-1, 4, 3000))),
        (FCOS["fcos-dense-default"].config, FCOS["fcos-dense-default"].arguments(n=20)),
        (case.config, case.arguments(n=20)),
    ]
    for least in (1, 1 << 40):
        monkeypatch.setattr("lossd.narrow._LEAST_BYTES", least)
        results.append([client.compute_loss(loss, *arguments, gradients=True) for loss, arguments in calls])
    for narrow, wide in zip(*results, strict=True):
        assert narrow.loss == wide.loss
        for name, gradient in wide.gradients.items():
            assert all(map(same_bits, flat(narrow.gradients[name]), flat(gradient)))


def test_a_wrong_label_is_named_as_it_was(client):
    labels = np.zeros(3000, np.int64)
    labels[7] = 300
    with pytest.raises(InvalidInputError, match=r"label at \[7\] is 300, want -1..3"):
        client.compute_loss(FocalLoss(), np.zeros((3000, 4), np.float32), labels)


@pytest.mark.parametrize("sparse", [True, False])
def test_targets_come_in_the_types_that_are_said_of_them(client, sparse):
    """On the wire most integers of a large answer are of one byte or two."""
    boxes = np.array([[0, 0, 800, 1300], [9, 9, 60, 60]], np.float32)
    image = {"boxes": boxes, "labels": np.array([79, 300]), "iscrowd": np.array([False, True])}
    found = client.assign_targets(FCOSAssigner(), [image] * 2, image_size=(1333, 800), sparse=sparse)
    if sparse:
        integers = {"locations": "i4", "labels": "i8", "matched": "i4", "ignored": "i4"}
        arrays = [(getattr(found, name), dtype) for name, dtype in integers.items()]
    else:
        arrays = [(cls, "i8") for cls in found.cls]
    for array, dtype in arrays:
        assert array.dtype == dtype
        assert not array.flags.writeable


def test_targets_are_sent_as_they_are():
    """Distances of targets in bfloat16 would be off by pixels."""
    case, storage = FCOS["fcos-dense-default"], _storage.Storage(None)
    storage.form = WireForm(np.dtype(np.float16))
    item = case.config.item(case.arguments(), "items[0].fcos", storage)
    sent = pb.LossItem.FromString(b"".join(placed(item))).fcos
    types = {name: {tensor.dtype for tensor in getattr(sent, name)} for name in FCOSLoss.inputs[:6]}
    assert all(types[name] == {tensor_pb2.DATA_TYPE_FLOAT16} for name in FCOSLoss.differentiable)
    assert types["reg_targets"] == types["centerness_targets"] == {tensor_pb2.DATA_TYPE_FLOAT32}
