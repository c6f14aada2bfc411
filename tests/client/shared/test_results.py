"""Calls through shared memory give what calls by message give."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch

from lossd_client import (
    AsyncClient,
    CustomLoss,
    FCOSLoss,
    FocalLoss,
    InvalidInputError,
)
from lossd_client.torch import RemoteLoss
from lossd_server.losses import FocalLoss as LocalFocalLoss
from tests.client.shared.support import LABELS, LOGITS, assert_same, flat, is_shared
from tests.client.support import FCOS, SIMPLE


@pytest.mark.parametrize("name", [*SIMPLE, *FCOS])
def test_every_loss_gives_the_bits_of_inline(client, inline, tiny, name):
    case = {**SIMPLE, **FCOS}[name]
    items = [case.arguments(seed, n) for seed, n in enumerate((6, 1, 3))]
    results = client.compute_losses(case.config, items, gradients=True)
    for result, expected in zip(
        results, inline.compute_losses(case.config, items, gradients=True), strict=True
    ):
        assert_same(result, expected)
        for gradient in result.gradients.values():
            assert all(is_shared(client, array) for array in flat(gradient))


@pytest.mark.parametrize("gradient_dtype", [None, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16, ">f4", ">f8"])
def test_every_type_gives_the_bits_of_inline(client, inline, dtype, gradient_dtype):
    arguments = LOGITS.astype(dtype), LABELS
    options = {"gradients": True, "gradient_dtype": gradient_dtype}
    assert_same(
        client.compute_loss(FocalLoss(), *arguments, **options),
        inline.compute_loss(FocalLoss(), *arguments, **options),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, :, ::2],
        lambda a: a[::-1],
        np.asfortranarray,
        torch.from_numpy,
    ],
)
def test_inputs_of_every_form(client, inline, change):
    arguments = change(LOGITS), LABELS[:, :: 2 if change(LOGITS).shape != LOGITS.shape else 1]
    results = [c.compute_loss(FocalLoss(), *arguments, gradients=True) for c in (client, inline)]
    assert_same(*results)


def test_a_custom_loss_gives_the_bits_of_inline(client, inline, tiny):
    tensors = {"pred": LOGITS, "target": LOGITS / 2, "scale": None}
    del tensors["scale"]
    results = [c.compute_loss(CustomLoss("Squared"), tensors, gradients="pred") for c in (client, inline)]
    assert_same(*results)
    assert is_shared(client, results[0].gradients["pred"])


def test_in_a_torch_module(client):
    leaves = [torch.from_numpy(LOGITS.copy()).requires_grad_() for _ in range(2)]
    RemoteLoss(client, FocalLoss())(leaves[0], torch.from_numpy(LABELS)).backward()
    LocalFocalLoss()(leaves[1], torch.from_numpy(LABELS)).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_messages_carry_no_large_tensor(both, client, inline):
    def sent():
        value = both._metrics.registry.get_sample_value
        return [value(f"lossd_{way}_bytes_sum", {"method": "ComputeLoss"}) for way in ("request", "response")]

    before = sent()
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert all(after - first < 1000 for after, first in zip(sent(), before, strict=True))
    before = sent()
    inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert all(after - first > LOGITS.nbytes for after, first in zip(sent(), before, strict=True))


def test_small_tensors_go_inline(client):
    result = client.compute_loss(FocalLoss(), LOGITS[:1, :, :20, :20], LABELS[:1, :20, :20], gradients=True)
    assert not is_shared(client, result.gradients["inputs"])
    assert not client._sharing.pool()._regions


def test_a_gradient_may_be_an_input(client, inline):
    gradient = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True).gradients["inputs"]
    expected = inline.compute_loss(FocalLoss(), gradient.copy(), LABELS, gradients=True)
    assert_same(client.compute_loss(FocalLoss(), gradient, LABELS, gradients=True), expected)


def test_refused_input_says_what_it_says_inline(client, inline):
    messages = []
    for either in (client, inline):
        with pytest.raises(InvalidInputError) as caught:
            either.compute_loss(FocalLoss(), LOGITS, LABELS + 77, gradients=True)
        messages.append((str(caught.value), caught.value.field))
    assert messages[0] == messages[1]
    with pytest.raises(InvalidInputError) as caught:
        client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=["inputs", "CopyFrom", "targets"])
    assert caught.value.field == "gradients[1]"
    for dtype in ("c16", "O"):
        with pytest.raises(InvalidInputError, match="dtype"):
            client.compute_loss(FocalLoss(), LOGITS.astype(dtype), LABELS)
    gc.collect()
    client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert len(client._sharing.pool()._regions) == 1


def test_threads_share_one_client(client):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    expected = [client.compute_loss(FocalLoss(), logits, LABELS, gradients=True) for logits in inputs]

    def check(index):
        result = client.compute_loss(FocalLoss(), inputs[index % 4], LABELS, gradients=True)
        return np.array_equal(result.gradients["inputs"], expected[index % 4].gradients["inputs"])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(check, range(60)))


def test_asyncio(target, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]

    async def run():
        async with AsyncClient(target) as client:
            array = await client.allocate(LOGITS.shape)
            array[:] = LOGITS
            calls = [client.compute_loss(FocalLoss(), x, LABELS, gradients=True) for x in (*inputs, array)]
            results = await asyncio.gather(*calls)
            assert all(is_shared(client, result.gradients["inputs"]) for result in results)
            return results

    for result, logits in zip(asyncio.run(run()), (*inputs, LOGITS), strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))


def test_a_whole_head_goes_through_shared_memory(client, inline):
    rng = np.random.default_rng(3)
    sizes = ((64, 64), (32, 32), (1, 1), (0, 0))
    heads = [
        [rng.standard_normal((2, channels, *size), dtype=np.float32) for size in sizes]
        for channels in (80, 4, 1)
    ]
    heads[1] = [np.abs(level) * 8 for level in heads[1]]
    truth = [{"boxes": [[8.0, 8.0, 90.0, 70.0]], "labels": [3]}] * 2
    ranges = ((-1, 64), (64, 128), (128, 256), (256, 1e8))
    loss = FCOSLoss(num_classes=80, strides=(8, 16, 32, 64), regress_ranges=ranges)
    results = [c.compute_loss(loss, *heads, truth, gradients=True) for c in (client, inline)]
    assert_same(*results)
    assert all(is_shared(client, level) for level in results[0].gradients["cls_preds"] if level.size)


def test_a_stream_goes_through_shared_memory(client, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0, 2.5)]
    results = []
    for result in client.compute_loss_stream(
        FocalLoss(), ((x, LABELS) for x in inputs), gradients=True, window=3
    ):
        assert is_shared(client, result.gradients["inputs"])
        results.append(result)
    for result, logits in zip(results, inputs, strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))
    assert not any(region.is_retired for region in client._sharing.pool()._regions)


def test_asyncio_a_stream_goes_through_shared_memory(target, inline):
    inputs = [LOGITS * scale for scale in (0.5, 1.0, 1.5, 2.0)]

    async def run():
        async with AsyncClient(target) as client:
            stream = client.compute_loss_stream(FocalLoss(), [(x, LABELS) for x in inputs], gradients=True)
            results = [result async for result in stream]
            assert all(is_shared(client, result.gradients["inputs"]) for result in results)
            return results

    for result, logits in zip(asyncio.run(run()), inputs, strict=True):
        assert_same(result, inline.compute_loss(FocalLoss(), logits, LABELS, gradients=True))
