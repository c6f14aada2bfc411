"""The threads of handlers: as many as are wanted, none lost, none left."""

import subprocess
import sys
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


def test_after_a_crowd_all_are_free_again(threads):
    done, held = threading.Semaphore(0), threading.Event()
    for _ in range(20):
        threads.submit(held.wait, 10).add_done_callback(lambda _call: done.release())
    assert threads._free == 3 - 20
    held.set()
    for _ in range(20):
        assert done.acquire(timeout=10)
    eventually(lambda: threads._free == 3)


def test_where_the_system_has_no_more_threads_calls_wait_for_those_there_are(threads, monkeypatch):
    held, done = threading.Event(), threading.Semaphore(0)
    threads.submit(held.wait, 10)

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(4):
            threads.submit(done.release)
    held.set()
    for _ in range(4):
        assert done.acquire(timeout=10)
    for _ in range(3):  # and now it has
        threads.submit(done.release)
        assert done.acquire(timeout=10)


def test_without_any_thread_a_call_is_refused(threads, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="start"):
            threads.submit(print)
    done = threading.Semaphore(0)
    threads.submit(done.release)
    assert done.acquire(timeout=10)


def test_a_call_is_made_though_its_thread_could_not_be_prepared():
    def fail():
        raise OSError("not here")

    done = threading.Semaphore(0)
    with capture_logs() as lines:
        threads = Threads(2, NAME, fail)
        threads.submit(done.release)
        assert done.acquire(timeout=10)
    assert [line["event"] for line in lines] == ["internal error"]
    threads.shutdown()
    threads.shutdown()
    eventually(lambda: not ours())


AT_WORK = """
import time, torch
from lossd_server.rpc.threads import Threads
threads = Threads(2, "lossd-tried", lambda: None)
def work():
    ends = time.monotonic() + 1
    while time.monotonic() < ends:
        torch.ones(1000, 100).exp().sum()
    print("done", flush=True)
threads.submit(work)
time.sleep(0.2)
"""


@pytest.mark.parametrize("end", ["", "threads.shutdown()", "raise SystemExit(0)"])
def test_the_interpreter_waits_for_calls_that_are_being_made(end):
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK + end], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


FORKED = """
import os, sys
from lossd_server.rpc.threads import Threads
threads = Threads(2, "lossd-tried", lambda: None)
threads._lock.acquire()
child = os.fork()
if child:
    threads._lock.release()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_of_a_fork_ends_though_the_lock_was_held():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


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
