"""The turn goes round in order, and is never lost or had by two."""

import threading
import time

from lossd_server.engine.turn import Turn


def waiting(turn, count):
    ends = time.monotonic() + 10
    while len(turn._waiting) < count:
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_it_comes_in_the_order_of_asking():
    turn, order, threads = Turn(), [], []
    assert turn.acquire(0)

    def take(number):
        assert turn.acquire(10)
        order.append(number)
        turn.release()

    for number in range(8):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        waiting(turn, number + 1)
    turn.release()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_who_gives_up_is_passed_over():
    turn, got = Turn(), threading.Event()
    assert turn.acquire(0)
    assert not turn.acquire(0.01)
    thread = threading.Thread(target=lambda: turn.acquire(10) and got.set())
    thread.start()
    waiting(turn, 1)
    turn.release()
    thread.join()
    assert got.is_set()
    assert not turn.acquire(0)


def test_only_one_has_it_whoever_gives_up_when():
    turn, inside, most, taken = Turn(), 0, 0, 0

    def run():
        nonlocal inside, most, taken
        for patience in (0.0, 1e-5, 1e-4, 1.0) * 50:
            if turn.acquire(patience):
                inside += 1
                most, taken = max(most, inside), taken + 1
                time.sleep(0)
                inside -= 1
                turn.release()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken >= 6 * 50
    assert turn.acquire(0)
