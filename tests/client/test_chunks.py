"""Large requests of the clients go in chunks, and so do their answers, with nothing for a caller to see."""

import asyncio
import contextlib
import gc
import threading
import tracemalloc
import weakref

import grpc
import numpy as np
import pytest

from lossd.headers import REQUEST_BYTES
from lossd.v1.loss_service_pb2 import ComputeLossInChunksResponse as Chunk
from lossd_client import (
    AccessError,
    AsyncClient,
    Client,
    DeadlineError,
    FocalLoss,
    InvalidInputError,
    RetryPolicy,
    ServerError,
    TooLargeError,
    UnavailableError,
    _loss_requests,
)
from tests.client.proxies import answer_in_chunks, break_after, delay_chunks, proxy_of, refuse
from tests.client.support import same_bits
from tests.client.twins import KINDS, open_twin

MEBIBYTE = 1 << 20
QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.02)


def focal(megabytes, seed=0):
    """Logits of so many megabytes, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((megabytes * MEBIBYTE // 32, 8), np.float32)
    return logits, rng.integers(-1, 8, len(logits))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def twin(target, kind):
    with proxy_of(target) as proxy, open_twin(kind, proxy.address) as twin:
        twin.client._max_message_bytes = 256 * MEBIBYTE
        twin.proxy = proxy
        yield twin


def test_the_result_is_that_of_the_whole_request(twin, monkeypatch):
    logits, labels = focal(12)
    result = twin.call("compute_loss", FocalLoss(), logits, labels, gradients=True)
    monkeypatch.setattr(_loss_requests, "LEAST_BYTES", 1 << 40)
    whole = twin.call("compute_loss", FocalLoss(), logits, labels, gradients=True)
    assert twin.proxy.calls == ["ComputeLossInChunks", "ComputeLoss"]
    assert twin.proxy.requests[0] == twin.proxy.requests[1]
    assert same_bits(result.loss, whole.loss)
    assert same_bits(result.gradients["inputs"], whole.gradients["inputs"])
    assert not result.gradients["inputs"].flags.writeable


@pytest.mark.parametrize(("megabytes", "method"), [(3, "ComputeLoss"), (5, "ComputeLossInChunks")])
def test_what_is_not_large_goes_whole(twin, megabytes, method):
    twin.call("compute_loss", FocalLoss(), *focal(megabytes))
    assert twin.proxy.calls == [method]


def test_the_server_is_told_how_long_it_is_before_it_comes(twin):
    twin.call("compute_loss", FocalLoss(), *focal(9))
    metadata = dict(twin.proxy.metadata[-1])
    assert metadata[REQUEST_BYTES] == str(len(twin.proxy.requests[-1]))


def test_a_server_that_knows_no_chunks_gets_it_whole(twin):
    twin.proxy.actions = [refuse(grpc.StatusCode.UNIMPLEMENTED)]
    assert twin.call("compute_loss", FocalLoss(), *focal(9), gradients=True).gradients
    assert twin.proxy.calls == ["ComputeLossInChunks", "ComputeLoss"]


@pytest.mark.parametrize("count", [0, 3])
def test_an_answer_that_breaks_off_is_asked_for_again(target, kind, count):
    logits, labels = focal(9)
    with (
        proxy_of(target, break_after(count)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
        Client(target) as plain,
    ):
        twin.client._max_message_bytes = 256 * MEBIBYTE
        result = twin.call("compute_loss", FocalLoss(), logits, labels, gradients=True)
        expected = plain.compute_loss(FocalLoss(), logits, labels, gradients=True)
    assert proxy.calls == ["ComputeLossInChunks"] * 2
    assert same_bits(result.gradients["inputs"], expected.gradients["inputs"])


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [Chunk(data=b"abc")],
        [Chunk(message_bytes=2, data=b"abc")],
        [Chunk(message_bytes=4, data=b"abc")],
        [Chunk(message_bytes=3, data=b"\xff\xff\xff")],
    ],
    ids=["none", "no length", "longer", "cut short", "no answer"],
)
def test_an_answer_that_is_none_is_the_servers_fault(twin, chunks):
    twin.proxy.actions = [answer_in_chunks(*chunks)]
    with pytest.raises(ServerError, match="the server's answer"):
        twin.call("compute_loss", FocalLoss(), *focal(9))
    assert twin.call("compute_loss", FocalLoss(), *focal(9)).loss > 0


def test_what_is_wrong_is_told_by_its_field(target, kind):
    logits, labels = focal(9)
    labels[5] = 8
    with open_twin(kind, target) as twin:
        with pytest.raises(InvalidInputError, match="label at \\[5\\] is 8") as caught:
            twin.call("compute_loss", FocalLoss(), logits, labels)
        assert caught.value.field == "items[0].focal.targets"
        assert twin.call("compute_loss", FocalLoss(), *focal(9)).loss > 0


@pytest.fixture
def _nothing_is_collected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_nothing_is_collected")
def test_a_call_that_failed_keeps_nothing_of_what_it_sent(target):
    logits, labels = focal(9)
    labels[5] = 8
    sent = weakref.ref(logits)
    with Client(target) as client:
        with contextlib.suppress(InvalidInputError):
            client.compute_loss(FocalLoss(), logits, labels)
        del logits
        assert sent() is None


@pytest.mark.usefixtures("_nothing_is_collected")
def test_neither_does_one_by_asyncio(target):
    async def run():
        logits, labels = focal(9)
        labels[5] = 8
        sent = weakref.ref(logits)
        async with AsyncClient(target) as client:
            with contextlib.suppress(InvalidInputError):
                await client.compute_loss(FocalLoss(), logits, labels)
            del logits
            assert sent() is None

    asyncio.run(run())


def test_a_timeout_holds(twin):
    twin.proxy.actions = [delay_chunks]
    with pytest.raises(DeadlineError):
        twin.call("compute_loss", FocalLoss(), *focal(9), timeout=0.5)


def test_nobody_there(kind):
    with open_twin(kind, "127.0.0.1:1", retries=None) as twin:
        twin.client._max_message_bytes = 256 * MEBIBYTE
        with pytest.raises(UnavailableError):
            twin.call("compute_loss", FocalLoss(), *focal(9))


def test_a_cancelled_call_is_cancelled(target):
    async def run():
        with proxy_of(target, delay_chunks) as proxy:
            async with AsyncClient(proxy.address) as client:
                client._max_message_bytes = 256 * MEBIBYTE
                call = asyncio.create_task(client.compute_loss(FocalLoss(), *focal(9)))
                while not proxy.calls:
                    await asyncio.sleep(0.01)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                while not proxy.cancelled:
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_many_at_a_time_have_each_its_own_answer(target):
    inputs = [focal(9, seed) for seed in range(4)]
    with Client(target) as client:
        expected = [client.compute_loss(FocalLoss(), *arrays, gradients=True) for arrays in inputs]
        found = [None] * len(inputs)

        def ask(index):
            found[index] = client.compute_loss(FocalLoss(), *inputs[index], gradients=True)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result, one in zip(found, expected, strict=True):
        assert same_bits(result.gradients["inputs"], one.gradients["inputs"])


def test_neither_side_holds_a_request_or_an_answer_twice(target):
    """In this one process the server's request and gradient, and what the caller is given."""
    logits, labels = focal(48)
    with Client(target) as client:
        client.compute_loss(FocalLoss(), *focal(9), gradients=True)
        gc.collect()
        tracemalloc.start()
        try:
            client.compute_loss(FocalLoss(), logits, labels, gradients=True)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The memory of requests and gradients on the server's side is not Python's, but a pool's.
    assert peak < logits.nbytes + labels.nbytes + 16 * MEBIBYTE


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("UNAUTHENTICATED", AccessError),
        ("RESOURCE_EXHAUSTED", TooLargeError),
        ("UNAVAILABLE", UnavailableError),
    ],
)
def test_a_refusal_that_comes_before_the_chunks_do_is_heard(target, kind, code, error):
    refusals = [refuse(grpc.StatusCode[code], retry_after=100)] * 2
    with proxy_of(target, *refusals) as proxy, open_twin(kind, proxy.address, retries=None) as twin:
        twin.client._max_message_bytes = 256 * MEBIBYTE
        with pytest.raises(error, match="not now") as caught:
            twin.call("compute_loss", FocalLoss(), *focal(24))
        assert caught.value.retry_after == 100
