"""What was not answered is asked again: how often, after what pauses, and until when."""

import dataclasses
import pickle
import time

import grpc
import numpy as np
import pytest

from lossd.headers import REQUEST_BYTES
from lossd_client import DeadlineError, FocalLoss, RetryPolicy, UnavailableError
from lossd_client._retries import Attempts, Deadline
from tests.client.proxies import delay, proxy_of, refuse
from tests.client.twins import KINDS, open_twin
from tests.service.support import focal_arrays

MEGABYTE = 1 << 20
QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.02)


def focal(n=5, seed=0):
    arrays = focal_arrays(np.random.default_rng(seed), n)
    return arrays["inputs"], arrays["targets"]


def unavailable(retry_after=None):
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, "not now", retry_after=retry_after)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("megabytes", "method"), [(1, "ComputeLoss"), (24, "ComputeLossInChunks")])
def test_a_large_request_is_asked_again(target, kind, megabytes, method):
    logits = np.zeros((megabytes * MEGABYTE // 32, 8), np.float32)
    with proxy_of(target, refuse(), refuse()) as proxy, open_twin(kind, proxy.address) as twin:
        twin.client._max_message_bytes = 256 * MEGABYTE  # so that its own question is not the one refused
        result = twin.call("compute_loss", FocalLoss(), logits, np.zeros(len(logits), np.int64))
    assert result.positive_count == len(logits)
    assert (len(proxy.calls), proxy.calls[0]) == (3, method)
    assert len(set(proxy.requests)) == 1


def test_a_server_that_stays_away_is_reported_after_a_few_tries(target, kind):
    policy = RetryPolicy(max_attempts=3, initial_backoff=0.01)
    with proxy_of(target, *[refuse()] * 9) as proxy, open_twin(kind, proxy.address, retries=policy) as twin:
        with pytest.raises(UnavailableError, match="not now"):
            twin.call("server_info")
        assert len(proxy.calls) == 3


def test_without_retries_the_first_word_is_the_last(target, kind):
    with proxy_of(target, refuse()) as proxy, open_twin(kind, proxy.address, retries=None) as twin:
        with pytest.raises(UnavailableError, match="not now"):
            twin.call("server_info")
        assert len(proxy.calls) == 1
        assert twin.call("server_info").version


@pytest.mark.parametrize("code", ["INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"])
def test_only_unavailable_is_asked_again(target, kind, code):
    with proxy_of(target, refuse(grpc.StatusCode[code])) as proxy, open_twin(kind, proxy.address) as twin:
        with pytest.raises(Exception, match="not now") as caught:
            twin.call("server_info")
        assert caught.value.code is grpc.StatusCode[code]
        assert len(proxy.calls) == 1


@pytest.mark.parametrize(
    "pushback", [{"retry_after": 0.7}, {"grpc_retry_pushback_ms": "700"}], ids=["RetryInfo", "trailer"]
)
def test_a_server_that_asks_for_a_pause_gets_it(target, kind, pushback):
    refusals = [refuse(**pushback)] * 2
    with proxy_of(target, *refusals) as proxy, open_twin(kind, proxy.address, retries=QUICK) as twin:
        assert twin.call("server_info").version
    assert len(proxy.times) == 3
    assert all(later - earlier >= 0.7 for earlier, later in zip(proxy.times, proxy.times[1:], strict=False))


@pytest.mark.parametrize("word", ["-1", "whatever"])
def test_a_server_that_wants_no_second_attempt_gets_none(target, kind, word):
    with (
        proxy_of(target, refuse(grpc_retry_pushback_ms=word)) as proxy,
        open_twin(kind, proxy.address, timeout=None) as twin,
    ):
        with pytest.raises(UnavailableError) as caught:
            twin.call("server_info")
        assert caught.value.retry_after == float("inf")
        assert len(proxy.calls) == 1


def test_no_pause_outlasts_the_deadline(target, kind):
    with proxy_of(target, refuse(retry_after=60)) as proxy, open_twin(kind, proxy.address) as twin:
        with pytest.raises(UnavailableError) as caught:
            twin.call("server_info", timeout=20)
        assert caught.value.retry_after == 60
        assert len(proxy.calls) == 1


def test_one_deadline_spans_all_attempts(target, kind):
    policy = RetryPolicy(max_attempts=50, initial_backoff=0.2, max_backoff=0.2)
    with proxy_of(target, *[refuse()] * 50) as proxy, open_twin(kind, proxy.address, retries=policy) as twin:
        began = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineError)):
            twin.call("server_info", timeout=1)
        assert 2 <= len(proxy.calls) <= 11
        assert time.monotonic() - began < 20


def test_one_deadline_spans_all_messages_of_a_batch(small_target, kind):
    items = [focal(n, seed=n) for n in (30_000, 29_000, 28_000)]
    with (
        proxy_of(small_target, delay(0), delay(0), delay(1.5), delay(60)) as proxy,
        open_twin(kind, proxy.address) as twin,
    ):
        with pytest.raises(DeadlineError):
            twin.call("compute_losses", FocalLoss(), items, timeout=3)
        assert proxy.calls == ["GetServerInfo", *["ComputeLoss"] * 3]


def test_of_a_batch_in_several_messages_one_alone_is_asked_again(small_target, kind):
    items = [focal(n, seed=n) for n in (30_000, 29_000)]
    with (
        proxy_of(small_target, delay(0), delay(0), refuse()) as proxy,
        open_twin(kind, proxy.address, retries=QUICK) as twin,
    ):
        results = twin.call("compute_losses", FocalLoss(), items)
    assert [len(set(map(len, proxy.requests[n : n + 2]))) for n in (1, 2)] == [2, 1]
    assert [result.loss.shape for result in results] == [()] * 2


def test_a_call_waits_for_a_server_only_where_it_is_told_to(target, kind):
    with proxy_of(target) as proxy:
        address = proxy.address
    with open_twin(kind, address, wait_for_ready=True, retries=None) as twin, pytest.raises(DeadlineError):
        twin.call("server_info", timeout=1)
    with open_twin(kind, address, retries=None) as twin, pytest.raises(UnavailableError):
        twin.call("server_info", timeout=30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0, want at least 1"),
        ({"initial_backoff": -1}, "initial_backoff is -1, want at least 0"),
        ({"max_backoff": 0.05}, "max_backoff is 0.05, want at least 0.1"),
        ({"multiplier": 0.5}, "multiplier is 0.5, want at least 1"),
        ({"max_backoff": float("nan")}, "max_backoff is nan"),
    ],
)
def test_policies_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        RetryPolicy(**settings)


def test_backoff_doubles_up_to_its_end():
    policy = RetryPolicy(max_backoff=0.5)
    assert [policy.backoff(n) for n in (1, 2, 3, 4, 5000)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_pauses_differ_and_are_at_least_what_the_server_asks_for():
    pauses = [Attempts(RetryPolicy(), Deadline(None)).pause_after(unavailable(1.5)) for _ in range(50)]
    assert len(set(pauses)) == 50
    assert all(1.55 <= pause <= 1.6 for pause in pauses)


def test_an_answer_makes_the_count_start_anew():
    attempts = Attempts(RetryPolicy(max_attempts=2), Deadline(None))
    for _ in range(5):
        attempts.pause_after(unavailable())
        attempts.start_anew()
    attempts.pause_after(unavailable())
    with pytest.raises(UnavailableError):
        attempts.pause_after(unavailable())


def test_what_is_left_of_a_deadline():
    assert Deadline(None).remaining() is None
    assert Deadline(-1).remaining() == 0
    assert 50 < Deadline(60).remaining() <= 60


def test_a_pickled_client_keeps_its_settings(kind):
    settings = {
        "target": ("127.0.0.1:1", "127.0.0.1:2"),
        "timeout": 12.5,
        "shared_memory": False,
        "retries": RetryPolicy(max_attempts=2),
        "hedge_after": 0.5,
        "wait_for_ready": True,
    }
    copy = pickle.loads(pickle.dumps(kind.kind(**settings)))  # noqa: S301
    assert copy._settings == settings
    assert dataclasses.asdict(copy._retries)["max_attempts"] == 2


@pytest.mark.parametrize("token", [None, "secret"])
def test_of_a_large_request_its_size_is_told_before_it_comes(target, kind, token):
    logits = np.zeros((20_000, 8), np.float32)
    with (
        proxy_of(target) as proxy,
        open_twin(kind, proxy.address, token=token) as twin,
    ):
        twin.call("compute_loss", FocalLoss(), logits, np.zeros(len(logits), np.int64))
        twin.call("server_info")
    told = [dict(metadata).get(REQUEST_BYTES) for metadata in proxy.metadata]
    assert told == [str(len(proxy.requests[0])), None]
    assert {dict(metadata).get("authorization") for metadata in proxy.metadata} == {token and "Bearer secret"}
