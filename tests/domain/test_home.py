"""The threads of small calls share a core; large work, and whatever it makes, has all of them."""

import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossd_server.engine import Home
from lossd_server.engine.core_usage import find_better, is_full
from lossd_server.engine.home import LARGE_BYTES

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, and a system that says which")


def here():
    return os.sched_getaffinity(0)


def policy():
    return os.sched_getscheduler(0)


def in_thread(function):
    """What a function returns on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_thread_settles_on_one_core_and_leaves_the_others_alone():
    home = Home(CORES)

    def settled():
        home.settle()
        return here()

    assert len(in_thread(settled)) == 1
    assert in_thread(settled) == in_thread(settled)
    assert here() == CORES


def test_large_work_is_done_away_and_small_work_at_home():
    home = Home(CORES)

    def seen():
        home.settle()
        places = [here()]
        with home.away(LARGE_BYTES - 1):
            places.append(here())
        with home.away(LARGE_BYTES):
            places.append(here())
            with home.away():
                places.append(here())
            places.append(here())
        return [*places, here()]

    at_home, small, large, within, after_within, back = map(len, in_thread(seen))
    assert (at_home, small, back) == (1, 1, 1)
    assert large == within == after_within == len(CORES)


def test_threads_made_by_large_work_have_all_cores():
    home = Home(CORES)

    def made():
        home.settle()
        with home.away():
            return in_thread(here)

    assert in_thread(made) == CORES


def test_a_thread_that_never_settled_is_nowhere_away_from():
    home = Home(CORES)
    with home.away():
        assert here() == CORES
    assert here() == CORES


def test_an_error_brings_a_thread_back():
    home = Home(CORES)

    def failed():
        home.settle()
        with pytest.raises(ValueError, match="no"), home.away():
            raise ValueError("no")
        return here()

    assert len(in_thread(failed)) == 1


def test_threads_made_in_a_block_stay_at_home():
    home = Home(CORES)
    done = threading.Event()
    with home.of_new_threads():
        thread = threading.Thread(target=done.wait)
        thread.start()
    assert here() == CORES
    try:
        assert len(os.sched_getaffinity(thread.native_id)) == 1
        for core in CORES:
            home.move(core)
            assert os.sched_getaffinity(thread.native_id) == {core}
    finally:
        done.set()
        thread.join()
    home.move(min(CORES))  # a thread that has ended does not matter


def test_who_is_away_comes_back_to_the_new_home():
    home = Home(CORES)

    def moved():
        home.settle()
        (before,) = here()
        other = min(CORES - {before})
        with home.away():
            home.move(other)
            during = here()
        return during, here(), {other}

    during, after, other = in_thread(moved)
    assert during == CORES
    assert after == other


def test_leaving_is_for_good():
    home = Home(CORES)

    def left():
        home.settle()
        home.leave()
        return here(), policy()

    assert in_thread(left) == (CORES, os.SCHED_OTHER)


def test_threads_at_home_are_patient_and_those_away_are_not():
    home = Home(CORES)

    def seen():
        home.settle()
        policies = [policy()]
        with home.away():
            policies += policy(), in_thread(policy)
        return [*policies, policy()]

    assert in_thread(seen) == [os.SCHED_BATCH, os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_BATCH]
    assert policy() == os.SCHED_OTHER


def test_work_that_is_done_away_is_not_done_at_home():
    home = Home(CORES)

    def work(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def seen():
        home.settle()
        before = home._seconds_at_home()
        work(0.05)
        between = home._seconds_at_home()
        with home.away():
            work(0.3)
        return between - before, home._seconds_at_home() - between

    here, there = in_thread(seen)
    assert 0.04 < here < 0.15
    assert there < 0.1


def test_nobody_is_patient_where_others_keep_the_core_busy():
    home = Home(CORES)

    def seen():
        home.settle()
        home.be_patient(is_patient=False)
        busy, late = policy(), in_thread(lambda: home.settle() or policy())
        home.be_patient(is_patient=True)
        return busy, late, policy()

    assert in_thread(seen) == (os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_BATCH)


@pytest.mark.parametrize("theirs", [os.SCHED_BATCH, os.SCHED_IDLE, os.SCHED_FIFO])
def test_a_policy_of_the_operators_is_let_be(monkeypatch, theirs):
    said = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda _process: theirs)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *given: said.append(given))
    home = Home(CORES)

    def stays():
        home.settle()
        home.be_patient(is_patient=False)
        home.be_patient(is_patient=True)
        with home.away():
            home.leave()

    in_thread(stays)
    assert not said


@pytest.mark.parametrize("cores", [set(), {min(CORES, default=0)}])
def test_with_one_core_nothing_is_done(cores):
    home = Home(cores)

    def seen():
        home.settle()
        with home.of_new_threads(), home.away():
            home.leave()
            return here()

    assert in_thread(seen) == CORES
    home.watch()
    home.close()


@pytest.mark.parametrize("error", [PermissionError, OSError])
@pytest.mark.parametrize("question", ["sched_setscheduler", "sched_getscheduler"])
def test_a_system_that_says_no_is_let_be(monkeypatch, error, question):
    def refuse(*_arguments):
        raise error

    monkeypatch.setattr(os, question, refuse)
    home = Home(CORES)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)

    def seen():
        home.settle()
        with home.of_new_threads(), home.away():
            home.move(min(CORES))
        home.leave()
        return here()

    assert in_thread(seen) == CORES


@pytest.mark.parametrize(
    ("free", "own", "better"),
    [
        pytest.param({0: 0.1, 1: 0.9}, 0.9, None, id="only we are here"),
        pytest.param({0: 0.0, 1: 0.9}, 0.2, 1, id="others are here, and there is room elsewhere"),
        pytest.param({0: 0.0, 1: 0.3}, 0.2, None, id="no room elsewhere"),
        pytest.param({0: 0.8, 1: 1.0}, 0.1, None, id="few others"),
        pytest.param({0: 0.0, 1: 0.6, 2: 0.9}, 0.1, 2, id="the best of several"),
        pytest.param({}, 0.0, None, id="a system that says nothing"),
        pytest.param({1: 1.0}, 0.0, None, id="a system that does not say it of our core"),
    ],
)
def test_where_to_move(free, own, better):
    assert find_better(0, free, own) == better


@pytest.mark.parametrize(
    ("free", "ours", "full"),
    [
        pytest.param({0: 0.1}, 0.75, False, id="a caller"),
        pytest.param({0: 0.2}, 0.4, False, id="a caller who has other work"),
        pytest.param({0: 0.0}, 0.5, True, id="others who never wait"),
        pytest.param({0: 0.0}, 0.9, False, id="nearly all of it is ours"),
        pytest.param({}, 0.0, False, id="a system that says nothing"),
    ],
)
def test_when_a_core_is_full(free, ours, full):
    assert is_full(0, free, ours) is full


def test_a_watching_home_is_patient_unless_its_core_is_full(monkeypatch):
    monkeypatch.setattr("lossd_server.engine.home._LOOK_SECONDS", 0.01)
    full = itertools.cycle([True, False])
    monkeypatch.setattr("lossd_server.engine.home.is_full", lambda *_: next(full))
    monkeypatch.setattr("lossd_server.engine.home.find_better", lambda *_: None)
    home = Home(CORES)
    said, enough = [], threading.Event()

    def note(*, is_patient):
        said.append(is_patient)
        if len(said) == 4:
            enough.set()

    monkeypatch.setattr(home, "be_patient", note)
    home.watch()
    try:
        assert enough.wait(10)
    finally:
        home.close()
    assert said[:4] == [False, True, False, True]


def test_a_watching_home_moves_out_of_the_way(monkeypatch):
    monkeypatch.setattr("lossd_server.engine.home._LOOK_SECONDS", 0.01)
    home = Home(CORES)
    chosen, moved = [], threading.Event()

    def better(core, _free, _own):
        chosen.append(min(CORES - {core}))
        return chosen[-1]

    def move(core):
        if core == chosen[-1]:
            moved.set()

    monkeypatch.setattr("lossd_server.engine.home.find_better", better)
    monkeypatch.setattr(home, "move", move)
    home.watch()
    try:
        assert moved.wait(10)
    finally:
        home.close()
