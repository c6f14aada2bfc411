"""Turns at the host's cores: so many at a time, fair between flows, and none for whoever is gone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossd_server.engine import Asker
from lossd_server.engine.cores import Cores
from lossd_server.errors import CallerGoneError, DeadlineError
from tests.domain.regions import wait_until


class Work:
    """Work that takes turns; it notes who had one, in order, and how many had one at a time."""

    def __init__(self, count):
        self.cores = Cores(count)
        self.go_on = threading.Event()
        self.done = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def do(self, flow, cost=1):
        with self.cores.turn(Asker(flow=flow), cost):
            with self._lock:
                self._now += 1
                self.most = max(self.most, self._now)
                self.done.append(flow)
            assert self.go_on.wait(30)
            with self._lock:
                self._now -= 1


def submit(pool, work, *flows):
    """Has work wait for its turn, one after the other."""
    for flow in flows:
        waiting = work.cores.waiting_count
        pool.submit(work.do, flow)
        wait_until(lambda waiting=waiting: work.cores.waiting_count == waiting + 1)


def test_as_many_work_as_there_are_cores():
    work = Work(3)
    with ThreadPoolExecutor(20) as pool:
        for number in range(20):
            pool.submit(work.do, number)
        wait_until(lambda: work.cores.waiting_count == 17)
        work.go_on.set()
    assert len(work.done) == 20
    assert work.most == 3
    assert work.cores.waiting_count == 0


def test_one_who_asks_much_does_not_keep_another_waiting():
    work = Work(1)
    with ThreadPoolExecutor(20) as pool:
        pool.submit(work.do, "greedy")
        wait_until(lambda: work.done == ["greedy"])
        submit(pool, work, *["greedy"] * 6, "modest")
        work.go_on.set()
    assert work.done.index("modest") <= 2
    assert len(work.done) == 8


@pytest.mark.parametrize(
    ("asker", "error"),
    [
        (Asker(is_gone=lambda: True), CallerGoneError),
        (Asker(deadline=time.monotonic() - 1), DeadlineError),
    ],
)
def test_whoever_is_gone_leaves_the_queue(asker, error):
    work = Work(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work.do, "first")
        wait_until(lambda: work.done == ["first"])
        with pytest.raises(error), work.cores.turn(asker, 1):
            raise AssertionError("it had a turn")
        assert work.cores.waiting_count == 0
        work.go_on.set()
    with work.cores.turn(Asker(), 1):  # the core is free
        assert work.done == ["first"]


def test_what_is_cheap_does_not_wait():
    work = Work(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work.do, "first")
        wait_until(lambda: work.done == ["first"])
        work.cores._cheap = 5
        with work.cores.turn(Asker(is_gone=lambda: True), 5):
            work.go_on.set()


def test_a_failure_frees_the_core():
    cores = Cores(1)
    for _ in range(3):
        with pytest.raises(KeyError), cores.turn(Asker(), 1):
            raise KeyError
    assert cores.waiting_count == 0
