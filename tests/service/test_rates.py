"""Token buckets: what goes in over any time, on a clock that is turned by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossd_server.rpc.rates import Allowance, Bucket


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


RATES = st.floats(0.01, 1e6)
PAUSES = st.lists(st.floats(0, 5), min_size=1, max_size=60)


def take_when_there_is(bucket, clock, pauses, amount):
    """What was taken, and when, by someone who asks after each pause."""
    taken = []
    for pause in pauses:
        clock.now += pause
        if bucket.wait() == 0:
            bucket.take(amount)
            taken.append(clock.now)
    return taken


@settings(deadline=None)
@given(RATES, PAUSES)
def test_over_any_time_no_more_requests_than_the_rate_and_a_seconds_worth(rate, pauses):
    clock = Clock()
    taken = take_when_there_is(Bucket(rate, clock), clock, pauses, 1)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            allowed = rate * (taken[last] - taken[first]) + max(rate, 1)
            assert last - first + 1 <= allowed * (1 + 1e-9) + 1e-6


@settings(deadline=None)
@given(RATES, PAUSES, st.floats(1, 1e7))
def test_bytes_may_go_over_by_one_message_and_no_more(rate, pauses, size):
    clock = Clock()
    taken = take_when_there_is(Bucket(rate, clock), clock, pauses, size)
    if taken:
        allowed = rate * (taken[-1] - 100.0) + max(rate, 1) + size
        assert len(taken) * size <= allowed * (1 + 1e-9)


@settings(deadline=None)
@given(RATES, st.integers(1, 50))
def test_who_waits_as_long_as_told_is_let_in(rate, count):
    clock = Clock()
    bucket = Bucket(rate, clock)
    for _ in range(count):
        while wait := bucket.wait():
            clock.now += wait * (1 + 1e-9) + 1e-9
        bucket.take(3)
    assert bucket.wait() <= 3 / rate + 1e-6


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_a_full_bucket_is_a_seconds_worth(rate):
    clock = Clock()
    bucket = Bucket(rate, clock)
    clock.now += 1000
    assert len(take_when_there_is(bucket, clock, [0] * 1005, 1)) == rate


def test_less_than_one_a_second_is_one_at_a_time():
    clock = Clock()
    allowance = Allowance("slow", requests_per_second=0.25, clock=clock)
    assert allowance.begin() is None
    refusal = allowance.begin()
    assert refusal.retry_seconds == pytest.approx(4)
    assert "slow may ask 0.25 requests a second" in refusal.message
    clock.now += 4
    assert allowance.begin() is None


def test_bytes_of_a_large_message_are_paid_before_the_next():
    clock = Clock()
    allowance = Allowance("big", bytes_per_second=1000, clock=clock)
    assert allowance.begin() is None
    allowance.charge(6000)
    assert allowance.begin().retry_seconds == pytest.approx(5.001)
    clock.now += 5.01
    assert allowance.begin() is None


def test_a_refused_request_takes_nothing():
    clock = Clock()
    allowance = Allowance("both", requests_per_second=2, bytes_per_second=10, clock=clock)
    allowance.charge(20)
    for _ in range(50):
        assert allowance.begin().values["unit"] == "bytes a second"
    clock.now += 1.2
    assert [allowance.begin() is None for _ in range(3)] == [True, True, False]


def test_without_limits_nothing_is_refused():
    allowance = Allowance("free")
    allowance.charge(10**12)
    assert allowance.begin() is None
