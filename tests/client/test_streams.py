"""Streams of the synchronous client: order, refusals, flow control, and an end that leaves nothing."""

import threading

import numpy as np
import pytest

from lossd_client import (
    Client,
    DeadlineError,
    FCOSAssigner,
    InvalidInputError,
    LossdError,
    TooLargeError,
    UnavailableError,
)
from lossd_server.rpc.pipeline import WIDTH
from tests.client.stream_cases import HELD, LOSS, PRED, Watched, answer_threads, pairs, with_bad
from tests.client.support import FCOS, SIMPLE, same_bits
from tests.service import custom_modules
from tests.service.metrics import eventually
from tests.service.support import make_server, scene

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    eventually(lambda: not answer_threads())


@pytest.mark.parametrize("case", [SIMPLE["giou-none"], FCOS["fcos-truth-default"]], ids=["giou", "fcos"])
def test_results_are_those_of_single_calls(client, case):
    items = [case.arguments(seed=n, n=n + 2) for n in range(5)]
    results = list(client.compute_loss_stream(case.config, items, gradients=True, strict=True))
    assert len(results) == len(items)
    for result, item in zip(results, items, strict=True):
        expected = client.compute_loss(case.config, *item, gradients=True)
        assert same_bits(result.loss, expected.loss)
        assert result.components == expected.components
        for name, gradient in expected.gradients.items():
            many = gradient if isinstance(gradient, list) else [gradient]
            found = result.gradients[name] if isinstance(gradient, list) else [result.gradients[name]]
            assert all(map(same_bits, found, many))


@pytest.mark.parametrize("window", [1, 2, 64])
def test_results_come_in_the_order_of_the_items(client, window):
    sizes = [1, 30_000, 1, 2, 60_000, 3, 1]
    items = [(np.zeros((n, 5), np.float32), np.zeros(n, np.int64)) for n in sizes]
    results = client.compute_loss_stream(LOSS, items, gradients=True, window=window)
    assert [len(result.gradients["inputs"]) for result in results] == sizes


def test_options_reach_the_server(client):
    (result,) = client.compute_loss_stream(
        LOSS, pairs(1), gradients=["inputs"], gradient_dtype=np.float16, normalizer=9.0
    )
    assert result.gradients["inputs"].dtype == np.float16
    assert float(result.loss) == pytest.approx(result.raw_sums["cls_loss"] / 9)


@pytest.mark.parametrize("sparse", [False, True])
def test_targets(client, sparse):
    batches = [[scene(np.random.default_rng(n), (96, 96))] for n in range(4)]
    settings = {"image_size": (96, 96), "sparse": sparse}
    found = list(client.assign_targets_stream(FCOSAssigner(), batches, **settings))
    expected = [client.assign_targets(FCOSAssigner(), batch, **settings) for batch in batches]
    assert [targets.positive_counts for targets in found] == [t.positive_counts for t in expected]
    assert [type(targets) for targets in found] == [type(targets) for targets in expected]


def test_no_items_no_results(client):
    assert list(client.compute_loss_stream(LOSS, [])) == []


def test_a_window_without_room_is_refused(client):
    with pytest.raises(ValueError, match="window is 0"):
        client.compute_loss_stream(LOSS, [], window=0)


@pytest.mark.parametrize("window", [1, 8])
def test_a_refused_item_is_raised_in_its_turn(client, window):
    results = client.compute_loss_stream(LOSS, with_bad(pairs(9), 5, 6), window=window)
    for _ in range(5):
        next(results)
    with pytest.raises(InvalidInputError) as caught:
        next(results)
    assert caught.value.reason == "LABEL_OUT_OF_RANGE"
    assert caught.value.field == "items[5].focal.targets"
    assert caught.value.value == "9"
    assert "items[5].focal.targets: label at [0] is 9" in str(caught.value)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("window", [1, 8])
def test_refused_items_among_the_results(client, window):
    items = with_bad(pairs(6), 1, 4)
    items[2] = (items[2][0], ["no", "label"])  # refused here, and never sent
    results = list(client.compute_loss_stream(LOSS, items, window=window, return_exceptions=True))
    refused = {n: result for n, result in enumerate(results) if isinstance(result, LossdError)}
    assert refused.keys() == {1, 2, 4}
    assert [error.field for error in refused.values()] == [f"items[{n}].focal.targets" for n in refused]
    assert refused[2].reason == "INVALID_DTYPE"


def test_all_items_refused_here(client):
    items = [(["x"], ["y"])] * 20
    results = list(client.compute_loss_stream(LOSS, items, window=2, return_exceptions=True))
    assert [error.field for error in results] == [f"items[{n}].focal.inputs" for n in range(20)]


def test_what_the_items_raise_comes_after_the_last_result(client):
    def items():
        yield from pairs(3)
        raise KeyError("lost")

    results = client.compute_loss_stream(LOSS, items())
    for _ in range(3):
        next(results)
    with pytest.raises(KeyError, match="lost"):
        next(results)


def test_an_item_of_the_wrong_form_is_raised(client):
    with pytest.raises(TypeError, match="FocalLoss takes inputs, targets"):
        list(client.compute_loss_stream(LOSS, [(1, 2, 3)]))


def test_a_slow_consumer_stops_the_producer(client):
    items = Watched(pairs(50))
    results = client.compute_loss_stream(LOSS, items, window=3)
    assert items.taken == 0
    for taken in range(1, 10):
        next(results)
        assert items.taken <= taken + 2
    results.close()
    assert items.taken < 13


def test_a_slow_producer_does_not_hold_back_answers(client):
    answered = threading.Semaphore(1)

    def items():
        for pair in pairs(5):
            assert answered.acquire(timeout=60)
            yield pair

    for _ in client.compute_loss_stream(LOSS, items()):
        answered.release()


def test_leaving_early_ends_the_call():
    custom_modules.release.clear()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:
            with Client(server.addresses[0]) as client:
                items = Watched([(PRED,)] * 50)
                results = client.compute_loss_stream(HELD, items, window=4)
                custom_modules.release.set()
                next(results)
                custom_modules.release.clear()
                results.close()
                assert not answer_threads()
                custom_modules.release.set()
                assert server._admission.wait_until_answered(30)
                assert client.compute_loss(LOSS, *pairs(1)[0]).loss > 0
            assert items.taken <= 5
    finally:
        custom_modules.release.set()


def test_a_server_that_stops_midway_is_unavailable():
    custom_modules.entered.clear()
    custom_modules.release.clear()
    try:
        server = make_server(load=("tests.service.custom_modules:Held",), drain_seconds=60)
        server.start()
        with Client(server.addresses[0], retries=None) as client:
            results = client.compute_loss_stream(HELD, [(PRED,)] * 50)
            stopping = threading.Thread(target=server.stop)
            threading.Thread(target=_stop_and_release, args=(stopping,)).start()
            done = []
            with pytest.raises(UnavailableError) as caught:
                _take_all(results, done)
            stopping.join(60)
            assert not stopping.is_alive()
        assert len(done) <= 2 * WIDTH  # none where the first item was read, but not begun
        assert caught.value.reason == "DRAINING"
    finally:
        custom_modules.release.set()


def _stop_and_release(stopping):
    assert custom_modules.entered.wait(30)
    stopping.start()
    stopping.join(0.3)
    custom_modules.release.set()


def _take_all(results, done):
    for result in results:
        done.append(result)


def test_no_server():
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        list(client.compute_loss_stream(LOSS, pairs(3), timeout=20))


def test_a_timeout_is_for_the_whole_stream():
    custom_modules.release.clear()
    try:
        with make_server(load=("tests.service.custom_modules:Held",)) as server:
            with Client(server.addresses[0]) as client, pytest.raises(DeadlineError):
                list(client.compute_loss_stream(HELD, [(PRED,)] * 3, timeout=0.5))
            custom_modules.release.set()
    finally:
        custom_modules.release.set()


def test_an_item_that_is_too_large_is_raised_in_its_turn(small_target):
    items = [*pairs(2), (np.zeros((60_000, 5), np.float32), np.zeros(60_000, np.int8)), *pairs(2)]
    with Client(small_target) as client:
        results = list(client.compute_loss_stream(LOSS, items, return_exceptions=True))
    assert [isinstance(result, TooLargeError) for result in results] == [False, False, True, False, False]
    assert results[2].field == "items[2]"
    assert results[2].metadata["limit"] == str(1 << 20)


def test_several_streams_of_one_client(client):
    streams = [client.compute_loss_stream(LOSS, pairs(10, rows)) for rows in (3, 5, 7)]
    for results in zip(*streams, strict=True):
        assert len({float(result.loss) for result in results}) == 3
