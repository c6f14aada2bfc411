"""Calls that are made again, and whose memory a server may still write to."""

import threading
import time

import numpy as np
import pytest

from lossd_client import Client, CustomLoss, FocalLoss, RetryPolicy, _lanes
from tests.client.lane_support import ENOUGH
from tests.client.shared.relay import Relay
from tests.client.shared.support import LABELS, LOGITS, assert_same, is_shared
from tests.client.twins import KINDS, open_twin
from tests.domain.regions import wait_until
from tests.service import custom_modules

HELD, ARGUMENTS = CustomLoss("Held"), {"pred": LOGITS}
QUICK = RetryPolicy(initial_backoff=0.01)


@pytest.fixture
def relay(tmp_path, target):
    with Relay(tmp_path / "relay.sock", target) as made:
        yield made


def in_flight(server, count):
    wait_until(lambda: server._admission.requests == count)


def cut_and_release(server, relay):
    """Breaks the connection of a call that is being evaluated, and lets both of its attempts go on."""
    assert custom_modules.entered.wait(30)
    relay.cut()
    wait_until(lambda: len(relay._open) > 1)
    custom_modules.release.set()


@pytest.mark.parametrize("method", ["call", "lane", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_never_written_to_by_an_earlier_attempt(both, relay, held, rapid, kind, method):
    with Client(both.addresses[1]) as other:
        custom_modules.release.set()
        expected = other.compute_loss(HELD, ARGUMENTS, gradients=True)
    custom_modules.release.clear()
    custom_modules.entered.clear()
    with open_twin(kind, relay.target, retries=QUICK) as twin:
        for _ in range(ENOUGH if method == "lane" else 1):
            twin.call("compute_loss", FocalLoss(), LOGITS, LABELS, gradients=True)
        assert both._handlers._lanes.used == (method == "lane")
        (region,) = twin.client._sharing.pool()._regions
        cutter = threading.Thread(target=cut_and_release, args=(both, relay))
        cutter.start()
        if method != "stream":
            result = twin.call("compute_loss", HELD, ARGUMENTS, gradients=True)
        else:
            (result,) = twin.stream("compute_loss_stream", HELD, [(ARGUMENTS,)], gradients=True)
        cutter.join()
        gradient = result.gradients["pred"]
        assert is_shared(twin.client, gradient)
        assert region.is_retired
        assert not region.address <= gradient.ctypes.data < region.address + region.size
        in_flight(both, 0)
        assert_same(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_whose_memory_is_lost_goes_on(both, target, inline, kind):
    items = [(LOGITS * n, LABELS) for n in range(1, 9)]

    def forgotten():
        yield from items[:4]
        regions = both._sharing.regions
        with regions._lock:
            regions._mappings.clear()
        yield from items[4:]

    expected = [inline.compute_loss(FocalLoss(), *item, gradients=True) for item in items]
    with open_twin(kind, target) as twin:
        twin.call("compute_loss", FocalLoss(), LOGITS, LABELS, gradients=True)
        results = twin.stream("compute_loss_stream", FocalLoss(), forgotten(), gradients=True, window=2)
        for result, want in zip(results, expected, strict=True):
            assert_same(result, want)
        assert is_shared(twin.client, results[-1].gradients["inputs"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_to_a_server_that_knows_no_region_at_last_sends_messages(both, target, monkeypatch, kind):
    find = both._sharing.regions.find
    monkeypatch.setattr(both._sharing.regions, "find", lambda _region_id: find(bytes(16)))
    with open_twin(kind, target) as twin:
        (result,) = twin.stream("compute_loss_stream", FocalLoss(), [(LOGITS, LABELS)], gradients=True)
        assert not is_shared(twin.client, result.gradients["inputs"])
        assert np.isfinite(result.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_that_ends_when_nothing_was_asked_costs_no_memory(both, target, rapid, monkeypatch, kind):
    monkeypatch.setattr(_lanes, "IDLE_SECONDS", 0.05)
    with open_twin(kind, target) as twin:
        kept = []
        for _ in range(3):
            kept += [evaluate(twin) for _ in range(ENOUGH)]
            time.sleep(0.3)
        (region,) = twin.client._sharing.pool()._regions
        assert not region.is_retired
        assert all(is_shared(twin.client, result.gradients["inputs"]) for result in kept)


def evaluate(twin):
    return twin.call("compute_loss", FocalLoss(), LOGITS, LABELS, gradients=True)
