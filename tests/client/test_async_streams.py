"""Streams of the asynchronous client: the same facts as for the synchronous one."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from lossd_client import (
    AsyncClient,
    FCOSAssigner,
    InvalidInputError,
    LossdError,
    TooLargeError,
    UnavailableError,
)
from tests.client.stream_cases import HELD, LOSS, PRED, Watched, pairs, with_bad
from tests.client.support import same_bits
from tests.service import custom_modules
from tests.service.support import make_server, scene

pytestmark = pytest.mark.timeout(120)


def with_client(target, use):
    """Runs `use(client)` in an event loop of its own, in which no task may stay."""

    async def run():
        async with AsyncClient(target) as client:
            result = await use(client)
        async with asyncio.timeout(20):  # gRPC has tasks of its own, which end in their time
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)
        return result

    return asyncio.run(run())


async def each(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("form", [list, iter, each])
@pytest.mark.parametrize("window", [1, 8])
def test_equals_the_synchronous_client(client, target, form, window):
    expected = list(client.compute_loss_stream(LOSS, pairs(10), gradients=True))

    async def use(client):
        stream = client.compute_loss_stream(LOSS, form(pairs(10)), gradients=True, window=window)
        return [result async for result in stream]

    found = with_client(target, use)
    assert all(same_bits(f.loss, e.loss) for f, e in zip(found, expected, strict=True))
    assert all(
        same_bits(f.gradients["inputs"], e.gradients["inputs"]) for f, e in zip(found, expected, strict=True)
    )


def test_targets(client, target):
    batches = [[scene(np.random.default_rng(n), (96, 96))] for n in range(4)]

    async def use(client):
        stream = client.assign_targets_stream(FCOSAssigner(), batches, image_size=(96, 96), sparse=True)
        return [targets async for targets in stream]

    expected = client.assign_targets_stream(FCOSAssigner(), batches, image_size=(96, 96), sparse=True)
    assert all(same_bits(f.ltrb, e.ltrb) for f, e in zip(with_client(target, use), expected, strict=True))


async def taken(stream):
    """What a stream gives, and the error that ends it."""
    results = []
    try:
        async for result in stream:
            results.append(result)  # noqa: PERF401  # what came before an error counts
    except (LossdError, KeyError, TypeError) as error:
        return results, error
    return results, None


def test_a_refused_item_is_raised_in_its_turn(target):
    results, error = with_client(
        target, lambda client: taken(client.compute_loss_stream(LOSS, with_bad(pairs(9), 5), window=2))
    )
    assert len(results) == 5
    assert type(error) is InvalidInputError
    assert error.field == "items[5].focal.targets"


def test_refused_items_among_the_results(target):
    items = with_bad(pairs(6), 1)
    items[2] = (items[2][0], ["no", "label"])
    results, error = with_client(
        target,
        lambda client: taken(client.compute_loss_stream(LOSS, items, window=1, return_exceptions=True)),
    )
    assert error is None
    assert [n for n, result in enumerate(results) if isinstance(result, LossdError)] == [1, 2]


def test_what_the_items_raise_comes_after_the_last_result(target):
    def items():
        yield from pairs(3)
        raise KeyError("lost")

    results, error = with_client(target, lambda client: taken(client.compute_loss_stream(LOSS, items())))
    assert len(results) == 3
    assert type(error) is KeyError


def test_an_item_of_the_wrong_form_is_raised(target):
    results, error = with_client(target, lambda client: taken(client.compute_loss_stream(LOSS, [(1, 2, 3)])))
    assert (results, type(error)) == ([], TypeError)


def test_a_slow_consumer_stops_the_producer(target):
    items = Watched(pairs(50))

    async def use(client):
        async with aclosing(client.compute_loss_stream(LOSS, items, window=3)) as stream:
            for done in range(1, 10):
                await anext(stream)
                await asyncio.sleep(0.01)
                assert items.taken <= done + 2

    with_client(target, use)
    assert items.taken < 13


def test_a_slow_producer_does_not_hold_back_answers(target):
    async def use(client):
        answered = asyncio.Semaphore(1)

        async def items():
            for pair in pairs(5):
                await asyncio.wait_for(answered.acquire(), 60)
                yield pair

        async for _ in client.compute_loss_stream(LOSS, items()):
            answered.release()

    with_client(target, use)


def test_leaving_early_ends_the_call():
    custom_modules.release.set()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:

            async def use(client):
                async with aclosing(client.compute_loss_stream(HELD, [(PRED,)] * 50, window=4)) as stream:
                    await anext(stream)
                    custom_modules.release.clear()
                custom_modules.release.set()
                return await client.compute_loss(LOSS, *pairs(1)[0])

            assert with_client(server.addresses[0], use).loss > 0
            assert server._admission.wait_until_answered(30)
    finally:
        custom_modules.release.set()


def test_a_server_that_stops_midway_is_unavailable():
    server = make_server()
    server.start()

    async def use(client):
        stream = client.compute_loss_stream(LOSS, pairs(1) * 100_000)
        await anext(stream)
        stopping = asyncio.get_running_loop().run_in_executor(None, server.stop)
        found = await taken(stream)
        await stopping
        return found

    results, error = with_client(server.addresses[0], use)
    assert len(results) < 100_000
    assert isinstance(error, UnavailableError)


def test_no_server():
    results, error = with_client(
        "127.0.0.1:1", lambda client: taken(client.compute_loss_stream(LOSS, pairs(3), timeout=20))
    )
    assert (results, type(error)) == ([], UnavailableError)


def test_an_item_that_is_too_large_is_raised_in_its_turn(small_target):
    items = [*pairs(1), (np.zeros((60_000, 5), np.float32), np.zeros(60_000, np.int8)), *pairs(1)]
    results, error = with_client(small_target, lambda client: taken(client.compute_loss_stream(LOSS, items)))
    assert len(results) == 1
    assert isinstance(error, TooLargeError)
    assert error.field == "items[1]"
