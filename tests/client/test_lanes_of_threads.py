"""Lanes where threads wait: shared by some, interrupted, forgotten, and in processes that fork."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossd_client import Client, CustomLoss
from lossd_client import _lanes as lanes
from tests.client.lane_support import ENOUGH, PRED, evaluate, in_use, open_lane, opened
from tests.client.test_processes import FORK_WARNING, Outside
from tests.client.twins import Sync
from tests.service import custom_modules
from tests.service.metrics import eventually

pytestmark = pytest.mark.usefixtures("rapid")


@pytest.fixture
def twin(lane_server):
    with Client(lane_server.addresses[0]) as client:
        yield Sync(client)


def test_one_that_is_idle_ends_and_the_next_is_opened_when_it_pays(lane_server, twin, monkeypatch):
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.1)
    open_lane(twin)
    eventually(lambda: in_use(lane_server) == 0)
    open_lane(twin)
    assert opened(lane_server) == 2
    eventually(lambda: in_use(lane_server) == 0)


def test_one_caller_has_it_and_others_go_by_themselves(lane_server, twin):
    seeds = range(16)
    expected = [evaluate(twin, seed).loss for seed in seeds]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: evaluate(twin, seed).loss, [*seeds] * 30))
    assert found == expected * 30
    assert opened(lane_server) == 1


def test_no_thread_is_left_when_it_has_ended(lane_server):
    before = set(threading.enumerate())
    with Client(lane_server.addresses[0]) as client:
        open_lane(Sync(client))
        made = {*client._lanes["ComputeLoss"]._lane._threads, _named("lossd-lanes")}
        assert made <= set(threading.enumerate()) - before
    eventually(lambda: not any(thread.is_alive() for thread in made))


def _named(name):
    return next(thread for thread in threading.enumerate() if thread.name == name)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_where_a_thread_cannot_be_made_calls_are(lane_server, twin, monkeypatch, fails):
    start, made = threading.Thread.start, []

    def start_if_possible(thread):
        if "lossd" not in thread.name or thread.name == "lossd-lanes":
            made.append(thread)
            if len(made) == fails:
                raise RuntimeError("can't start new thread")
        start(thread)

    for _ in range(lanes.RAPID_CALLS):
        evaluate(twin)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_if_possible)
        for _ in range(ENOUGH):
            assert evaluate(twin, timeout=20).loss > 0
        assert len(made) >= fails
    for _ in range(ENOUGH):
        assert evaluate(twin, timeout=20).loss > 0


def test_one_that_is_ended_by_a_thread_that_was_made_with_it_has_ended(lane_server, twin):
    open_lane(twin)
    lane = twin.client._lanes["ComputeLoss"]._lane
    lane._threads.append(threading.current_thread())
    lane.end()
    eventually(lambda: in_use(lane_server) == 0)
    assert evaluate(twin).loss > 0


def test_a_client_that_is_forgotten_leaves_nothing_behind(lane_server):
    open_lane(Sync(Client(lane_server.addresses[0])))
    eventually(lambda: in_use(lane_server) == 0)


class CallerInterruptedError(Exception):
    """What a signal's handler raises."""


def test_the_answer_of_a_caller_who_was_interrupted_is_nobody_elses(twin):
    def interrupt(*_signal):
        raise CallerInterruptedError

    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        expected = evaluate(twin).loss
        open_lane(twin)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(CallerInterruptedError):
            twin.call("compute_loss", CustomLoss("Held"), PRED)
        custom_modules.release.set()
        assert all(evaluate(twin).loss == expected for _ in range(ENOUGH))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


@FORK_WARNING
def test_a_fork_ends_it_and_both_sides_open_another():
    outside = Outside()
    try:
        with Client(outside.target, timeout=30) as client:
            expected = evaluate(Sync(client)).loss
            for _ in range(3):
                open_lane(Sync(client))
                child = os.fork()
                if child == 0:
                    good = all(evaluate(Sync(client)).loss == expected for _ in range(ENOUGH))
                    os._exit(0 if good else 1)
                open_lane(Sync(client))
                assert os.waitpid(child, 0)[1] == 0
    finally:
        outside.kill()
