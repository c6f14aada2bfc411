"""The threads of handlers: as many as are wanted, none lost, none left."""

import threading

import pytest
from structlog.testing import capture_logs

from lossd_server.rpc.threads import Threads
from tests.service.metrics import eventually

NAME = "lossd-tried"


@pytest.fixture
def threads():
    made = Threads(3, NAME, lambda: None)
    yield made
    made.shutdown()
    eventually(lambda: not ours())


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


def test_calls_are_made_with_their_arguments_on_threads_that_were_prepared():
    prepared, found = threading.local(), []

    def prepare():
        prepared.is_so = True

    threads = Threads(2, NAME, prepare)
    done = threading.Semaphore(0)
    for number in range(20):
        call = threads.submit(lambda *given: found.append((given, prepared.is_so)), number, "x")
        call.add_done_callback(lambda _call: done.release())
    for _ in range(20):
        assert done.acquire(timeout=10)
    assert sorted(found) == [((number, "x"), True) for number in range(20)]
    threads.shutdown()
    eventually(lambda: not ours())


def test_there_are_as_many_as_are_wanted_and_no_more(threads):
    held, begun = threading.Event(), threading.Semaphore(0)

    def hold():
        begun.release()
        held.wait(10)

    for wanted in (1, 2, 3):
        threads.submit(hold)
        assert begun.acquire(timeout=10)
        assert len(ours()) == wanted
    waiting = [threads.submit(begun.release) for _ in range(5)]
    assert not begun.acquire(timeout=0.05)
    assert len(ours()) == 3
    held.set()
    for _ in waiting:
        assert begun.acquire(timeout=10)


def test_a_free_thread_is_used_again(threads):
    done = threading.Semaphore(0)
    for _ in range(50):
        threads.submit(done.release)
        assert done.acquire(timeout=10)
        eventually(lambda: threads._free == 1)
    assert len(ours()) == 1


def test_a_callback_is_told_before_and_after(threads):
    held, told = threading.Event(), threading.Semaphore(0)
    call = threads.submit(held.wait, 10)
    call.add_done_callback(lambda done: told.release() if done is call else None)
    assert not told.acquire(timeout=0.05)
    held.set()
    assert told.acquire(timeout=10)
    call.add_done_callback(lambda done: told.release() if done is call else None)
    assert told.acquire(timeout=0)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_what_a_call_raises_is_logged_and_costs_no_thread(threads, error):
    def fail():
        raise error

    done = threading.Semaphore(0)
    with capture_logs() as lines:
        for _ in range(5):
            threads.submit(fail).add_done_callback(lambda _call: done.release())
        for _ in range(5):
            assert done.acquire(timeout=10)
    assert [line["event"] for line in lines] == ["internal error"] * 5
    threads.submit(done.release)
    assert done.acquire(timeout=10)


def test_nothing_begins_after_they_were_let_go():
    threads = Threads(1, NAME, lambda: None)
    held, begun, later = threading.Event(), threading.Event(), threading.Event()

    def hold():
        begun.set()
        held.wait(10)

    threads.submit(hold)
    assert begun.wait(10)
    threads.submit(later.set)
    threads.shutdown()
    with pytest.raises(RuntimeError, match="let go"):
        threads.submit(later.set)
    held.set()
    eventually(lambda: not ours())
    assert not later.is_set()
