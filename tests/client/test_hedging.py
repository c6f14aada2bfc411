"""A small call that stays without an answer is made again; the first good answer counts."""

import grpc
import numpy as np
import pytest

from lossd_client import DeadlineError, FocalLoss, InvalidInputError, UnavailableError
from tests.client.proxies import delay, proxy_of, refuse
from tests.client.twins import KINDS, open_twin
from tests.domain.regions import wait_until
from tests.service.support import focal_arrays, make_server

ARRAYS = focal_arrays(np.random.default_rng(0), 5)
SMALL = (FocalLoss(), ARRAYS["inputs"], ARRAYS["targets"])
LARGE = (FocalLoss(), np.zeros((70_000, 5), np.float32), np.zeros(70_000, np.int8))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_a_late_answer_is_not_waited_for(target, kind, client):
    with (
        proxy_of(target, delay(60)) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.1) as twin,
    ):
        result = twin.call("compute_loss", *SMALL, gradients=True)
        assert result.loss == client.compute_loss(*SMALL).loss
        assert set(proxy.calls) == {"ComputeLoss"}
        assert len(proxy.requests) >= 2
        assert len(set(proxy.requests)) == 1
        proxy.released.set()
        wait_until(lambda: proxy.cancelled)  # the one that lost was told


def test_of_two_servers_one_that_is_stuck_holds_up_nobody(target, kind):
    with (
        proxy_of(target, *[delay(60)] * 20) as stuck,
        proxy_of(target) as good,
        open_twin(kind, [stuck.address, good.address], hedge_after=0.1) as twin,
    ):
        for _ in range(10):
            twin.call("compute_loss", *SMALL, timeout=30)
        assert len(stuck.calls) >= 5
        assert len(good.calls) == 10


def test_two_in_a_row_that_are_stuck_hold_up_nobody(target, kind):
    with (
        proxy_of(target, delay(60), delay(60)) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.1) as twin,
    ):
        assert twin.call("server_info", timeout=30).version
        assert len(proxy.calls) == 3


def test_an_answer_in_time_is_the_only_one(target, kind):
    with proxy_of(target) as proxy, open_twin(kind, proxy.address, hedge_after=30) as twin:
        for _ in range(3):
            twin.call("server_info")
        assert len(proxy.calls) == 3


def test_calls_that_are_turned_away_do_not_count(target, kind):
    with (
        proxy_of(target, delay(1), refuse(), refuse()) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.1, retries=None) as twin,
    ):
        assert twin.call("server_info").version
        assert len(proxy.calls) == 3


def test_an_error_is_an_answer(target, kind):
    invalid = refuse(grpc.StatusCode.INVALID_ARGUMENT)
    with (
        proxy_of(target, delay(60), invalid) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.1) as twin,
    ):
        with pytest.raises(InvalidInputError, match="not now"):
            twin.call("server_info")
        assert len(proxy.calls) == 2


def test_where_both_are_turned_away_both_are_asked_again(target, kind):
    with (
        proxy_of(target, refuse(), refuse()) as proxy,
        open_twin(kind, proxy.address, hedge_after=0) as twin,
    ):
        assert twin.call("server_info").version
        assert len(proxy.calls) >= 3


def test_one_deadline_for_all(target, kind):
    with (
        proxy_of(target, *[delay(60)] * 4) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.1) as twin,
    ):
        with pytest.raises(DeadlineError):
            twin.call("server_info", timeout=1)
        assert len(proxy.calls) == 3


def test_without_a_server_it_is_unavailable(kind):
    with (
        open_twin(kind, "127.0.0.1:1", hedge_after=0.01, retries=None) as twin,
        pytest.raises(UnavailableError),
    ):
        twin.call("server_info", timeout=20)


def test_a_large_request_goes_once(target, kind):
    with (
        proxy_of(target, delay(0.5), delay(0.5)) as proxy,
        open_twin(kind, proxy.address, hedge_after=0.01) as twin,
    ):
        twin.client._max_message_bytes = 256 << 20
        twin.call("compute_loss", *LARGE)
        assert proxy.calls == ["ComputeLoss"]


def test_what_lies_in_shared_memory_is_asked_for_once(tmp_path, kind, monkeypatch):
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",)) as server,
        open_twin(kind, server.addresses[0], hedge_after=0) as twin,
    ):
        shared, small = [], []
        hedge = twin.client._hedge

        def watched(call, data):
            after = hedge(call, data)
            (small if after == 0 else shared).append(call.method)
            return after

        monkeypatch.setattr(twin.client, "_hedge", watched)
        twin.call("compute_loss", *LARGE, gradients=True)
        twin.call("compute_loss", *SMALL, gradients=True)
    assert (small, shared) == (["GetServerInfo", "ComputeLoss"], ["ComputeLoss"])


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_seconds_that_are_none(kind, seconds):
    with pytest.raises(ValueError, match="hedge_after is"):
        kind.kind(hedge_after=seconds)
