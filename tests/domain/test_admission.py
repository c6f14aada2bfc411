"""Who is let in, and who is not."""

import threading

import pytest

from lossd_server.engine.admission import Admission, Budget
from lossd_server.errors import Reason, UnavailableError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def admission(*, requests=8, size=1000, clock=None):
    return Admission(max_requests=requests, max_bytes=size, clock=clock or Clock())


def crowd(budget, holders, amount=1):
    """Has holders take in turn until none gets more; returns what each has."""
    taken = dict.fromkeys(holders, 0)
    while True:
        got = [holder for holder in holders if budget.take(holder, amount)]
        if not got:
            return taken
        for holder in got:
            taken[holder] += amount


@pytest.mark.parametrize(("count", "each"), [(1, 30), (2, 20), (3, 15)])
def test_everyone_has_as_much_as_is_left(count, each):
    budget = Budget(60)
    taken = crowd(budget, [f"peer {i}" for i in range(count)])
    assert set(taken.values()) == {each}
    assert budget.take("newcomer", 1)


def test_what_is_given_back_is_there_for_others():
    budget = Budget(4)
    assert crowd(budget, ["greedy"]) == {"greedy": 2}
    budget.give_back("greedy", 2)
    assert budget.used == 0
    assert crowd(budget, ["modest"]) == {"modest": 2}


def test_the_only_place_is_anyones():
    budget = Budget(1)
    assert budget.take("a", 1)
    assert not budget.take("b", 1)


def test_a_place_is_free_when_work_and_call_are_over():
    gate = admission(requests=1)
    place = gate.enter("a")
    gate.receive(place, 10)
    gate.leave(place)
    assert (gate.requests, gate.bytes) == (1, 10)
    assert not gate.wait_until_answered(0)
    gate.leave(place)
    assert (gate.requests, gate.bytes) == (0, 0)
    assert gate.wait_until_answered(0)


def test_a_request_too_many_is_refused_with_values():
    gate = admission(requests=1)
    gate.enter("a")
    with pytest.raises(UnavailableError, match="1 requests are in flight") as caught:
        gate.enter("b")
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.values == {"value": "1", "limit": "1"}


def test_bytes_count_before_they_come_where_they_are_declared():
    gate = admission(size=1000)
    gate.enter("a", 500)
    with pytest.raises(UnavailableError, match="500 bytes are in flight"):
        gate.enter("b", 501)
    assert gate.requests == 1
    gate.enter("b", 500)


def test_bytes_count_as_they_come_whatever_was_declared():
    gate = admission(size=1000)
    small, large = gate.enter("a", 900), gate.enter("b")
    gate.receive(small, 100)
    assert gate.bytes == 100
    with pytest.raises(UnavailableError, match="100 bytes are in flight"):
        gate.receive(large, 901)
    for place in (small, small, large, large):
        gate.leave(place)
    assert (gate.requests, gate.bytes) == (0, 0)


def test_what_was_declared_is_not_asked_for_again():
    admission = Admission(max_requests=10, max_bytes=100)
    admission.enter("a", 40)
    place = admission.enter("a")
    admission.declare(place, 20)
    admission.enter("b", 40)  # and nothing is left for anybody
    admission.receive(place, 20)
    assert admission.bytes == 100
    with pytest.raises(UnavailableError):
        admission.declare(place, 21)
    admission.declare(place, 5)
    assert admission.bytes == 85
    admission.leave(place)
    admission.leave(place)
    assert admission.bytes == 80


def test_bytes_on_a_stream_count_while_they_are_held():
    gate = admission(size=100)
    with gate.holding("a", 100):
        assert gate.bytes == 100
        with pytest.raises(UnavailableError), gate.holding("b", 1):
            pass
    assert gate.bytes == 0


def retry_seconds(gate, peer="other"):
    with pytest.raises(UnavailableError) as caught:
        gate.enter(peer)
    return caught.value.retry_seconds


@pytest.mark.parametrize(
    ("took", "least", "most"), [(0.0, 0.0375, 0.0625), (2.0, 1.5, 2.5), (500.0, 7.5, 12.5)]
)
def test_who_is_turned_away_comes_again_when_the_others_are_done(took, least, most):
    clock = Clock()
    gate = admission(requests=1, clock=clock)
    for _ in range(100):
        place = gate.enter("a")
        gate.receive(place, 1)
        clock.now += took
        gate.leave(place)
        gate.leave(place)
    gate.enter("a")
    told = {retry_seconds(gate) for _ in range(20)}
    assert least <= min(told) <= max(told) <= most
    assert len(told) > 1


def test_who_is_turned_away_waits_longer_where_nothing_is_done():
    clock = Clock()
    gate = admission(requests=1, clock=clock)
    gate.enter("a")
    clock.now += 4
    assert 3 <= retry_seconds(gate) <= 5


def test_nobody_is_let_in_once_it_drains_and_those_inside_are_waited_for():
    gate = admission()
    place = gate.enter("a")
    gate.receive(place, 1)
    gate.drain()
    with pytest.raises(UnavailableError) as caught:
        gate.enter("b")
    assert caught.value.reason is Reason.DRAINING
    found = []
    waiting = threading.Thread(target=lambda: found.append(gate.wait_until_answered(30)))
    waiting.start()
    gate.leave(place)
    gate.leave(place)
    waiting.join(30)
    assert found == [True]


def test_whose_body_has_not_come_is_not_waited_for():
    gate = admission()
    gate.enter("a")
    assert gate.wait_until_answered(0)
