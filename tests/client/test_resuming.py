"""Streams whose server goes away, or turns items away: nothing is lost, doubled or out of order."""

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest

from lossd_client import (
    Client,
    FCOSAssigner,
    InvalidInputError,
    LossdError,
    RetryPolicy,
    ServerError,
    UnavailableError,
)
from tests.client.proxies import cut_after, forward_stream, proxy_of, turn_away
from tests.client.stream_cases import LOSS, Watched, pairs, with_bad
from tests.client.support import same_bits
from tests.client.twins import KINDS, Async, open_twin
from tests.service.support import scene

QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.02, max_attempts=4)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def assert_same_as_calls(client):
    def check(results, items):
        assert len(results) == len(items)
        for result, item in zip(results, items, strict=True):
            expected = client.compute_loss(LOSS, *item, gradients=True)
            assert same_bits(result.loss, expected.loss)
            assert same_bits(result.gradients["inputs"], expected.gradients["inputs"])

    return check


def answer_only(count):
    """Ends a stream, as if all were well, with some of its answers."""

    def act(proxy, method, requests, call):
        yield from list(forward_stream(proxy, method, requests, call))[:count]

    return act


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("cuts", [[0], [3], [0, 0, 1, 2], [1] * 12])
def test_what_was_not_answered_is_sent_again(target, kind, assert_same_as_calls, window, cuts):
    items = pairs(15)
    with (
        proxy_of(target, *map(cut_after, cuts)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.stream("compute_loss_stream", LOSS, items, gradients=True, window=window)
    assert_same_as_calls(results, items)
    assert len(proxy.items) == len(cuts) + 1
    for places in proxy.items:
        assert places == sorted(set(places))


def test_items_are_taken_once(target, kind):
    items = Watched(pairs(20))
    with (
        proxy_of(target, cut_after(2), cut_after(3)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        assert len(twin.stream("compute_loss_stream", LOSS, items)) == 20
    assert items.taken == 20


def told(event):
    """Passes a stream on, and tells of it."""

    def act(proxy, method, requests, call):
        event.set()
        yield from forward_stream(proxy, method, requests, call)

    return act


def test_an_item_that_comes_when_its_server_is_gone_goes_to_the_next(target, assert_same_as_calls):
    items, is_resumed = pairs(6), threading.Event()

    def slowly():
        yield from items[:2]
        assert is_resumed.wait(30)
        yield from items[2:]

    with (
        proxy_of(target, cut_after(1), told(is_resumed)) as proxy,
        Client(proxy.address, retries=QUICK) as client,
    ):
        results = list(client.compute_loss_stream(LOSS, slowly(), gradients=True))
    assert_same_as_calls(results, items)


def test_asyncio_an_item_that_comes_when_its_server_is_gone_goes_to_the_next(target, assert_same_as_calls):
    items, is_resumed = pairs(6), threading.Event()

    async def slowly():
        for item in items[:2]:
            yield item
        assert await asyncio.to_thread(is_resumed.wait, 30)
        for item in items[2:]:
            yield item

    with (
        proxy_of(target, cut_after(1), told(is_resumed)) as proxy,
        open_twin(Async, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.stream("compute_loss_stream", LOSS, slowly(), gradients=True)
    assert_same_as_calls(results, items)


def test_targets_too(target, kind, client):
    batches = [[scene(np.random.default_rng(n), (96, 96))] for n in range(6)]
    settings = {"image_size": (96, 96), "sparse": True}
    with (
        proxy_of(target, cut_after(1), cut_after(2)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.stream("assign_targets_stream", FCOSAssigner(), batches, **settings)
    for found, batch in zip(results, batches, strict=True):
        assert same_bits(found.ltrb, client.assign_targets(FCOSAssigner(), batch, **settings).ltrb)


@pytest.mark.parametrize("actions", [[turn_away(2, 3)], [turn_away(0)] * 3, [turn_away(1), cut_after(0)]])
def test_items_that_are_turned_away_come_again(target, kind, assert_same_as_calls, actions):
    items = pairs(9)
    with proxy_of(target, *actions) as proxy, open_twin(kind, proxy.address, retries=QUICK) as twin:
        results = twin.stream("compute_loss_stream", LOSS, items, gradients=True, window=4)
    assert_same_as_calls(results, items)
    assert len(proxy.items) == len(actions) + 1


def test_a_stream_makes_the_pause_that_a_server_asks_for(target, kind, assert_same_as_calls):
    items = pairs(3)
    with (
        proxy_of(target, turn_away(1, retry_after=0.7)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.stream("compute_loss_stream", LOSS, items, gradients=True)
    assert_same_as_calls(results, items)
    assert proxy.times[1] - proxy.times[0] >= 0.7


@pytest.mark.parametrize("action", [cut_after(0), turn_away(0, 1, 2, 3)], ids=["cut", "turned away"])
def test_attempts_without_an_answer_are_bounded(target, kind, action):
    with proxy_of(target, *[action] * 9) as proxy, open_twin(kind, proxy.address, retries=QUICK) as twin:
        with pytest.raises(UnavailableError):
            twin.stream("compute_loss_stream", LOSS, pairs(3), return_exceptions=True)
        assert len(proxy.items) == QUICK.max_attempts


def test_results_come_before_the_error_of_a_server_that_stays_away(target, kind):
    results = []
    with (
        proxy_of(target, cut_after(3)) as proxy,
        open_twin(kind, proxy.address, retries=None) as twin,
        pytest.raises(UnavailableError),
    ):
        twin.stream("compute_loss_stream", LOSS, pairs(9), window=1, taken=results)
    assert len(results) == 3


def test_other_errors_end_the_stream(target, kind):
    def fail(proxy, method, requests, call):
        yield from list(forward_stream(proxy, method, requests, call))[:1]
        call.abort(grpc.StatusCode.INTERNAL, "not now")

    with (
        proxy_of(target, fail) as proxy,
        open_twin(kind, proxy.address) as twin,
        pytest.raises(ServerError, match="not now"),
    ):
        twin.stream("compute_loss_stream", LOSS, pairs(3))
    assert len(proxy.items) == 1


def test_a_server_that_ends_a_stream_early_is_at_fault(target, kind):
    with (
        proxy_of(target, answer_only(2)) as proxy,
        open_twin(kind, proxy.address) as twin,
        pytest.raises(ServerError, match="ended the stream after 2 of"),
    ):
        twin.stream("compute_loss_stream", LOSS, pairs(9), window=64)


def test_refused_items_keep_their_places(target, kind):
    items = with_bad(pairs(8), 1, 6)
    items[3] = (items[3][0], ["no", "label"])  # refused here, and never sent
    with (
        proxy_of(target, cut_after(1), cut_after(2)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.stream("compute_loss_stream", LOSS, items, return_exceptions=True)
    refused = {n: result for n, result in enumerate(results) if isinstance(result, LossdError)}
    assert refused.keys() == {1, 3, 6}
    assert all(isinstance(error, InvalidInputError) for error in refused.values())
    assert [error.field for error in refused.values()] == [f"items[{n}].focal.targets" for n in refused]


def test_what_items_raise_comes_after_the_last_result(target, kind):
    def items():
        yield from pairs(5)
        raise KeyError("lost")

    results = []
    with (
        proxy_of(target, cut_after(2)) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
        pytest.raises(KeyError, match="lost"),
    ):
        twin.stream("compute_loss_stream", LOSS, items(), taken=results)
    assert len(results) == 5


def test_one_deadline_spans_all_calls(target, kind):
    policy = RetryPolicy(initial_backoff=0.2, max_backoff=0.2, max_attempts=500)
    began = time.monotonic()
    with (
        proxy_of(target, *[cut_after(0)] * 500) as proxy,
        open_twin(kind, proxy.address, retries=policy) as twin,
        pytest.raises(LossdError) as caught,
    ):
        twin.stream("compute_loss_stream", LOSS, pairs(3), timeout=1)
    assert caught.value.code.name in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert 2 <= len(proxy.items) <= 11
    assert time.monotonic() - began < 30
