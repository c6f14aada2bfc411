"""Ten times of what a server can do: it does as much as ever, says no to the rest, and keeps its memory."""

import pytest

from tests.faults.driving import drive
from tests.faults.support import LONG, victim

PLACES = 8
FACTOR = 10
CALLERS = 60
BODY = 6_400_000


@pytest.fixture
def server(tmp_path):
    with victim(tmp_path, "--max-in-flight", str(PLACES)) as running:
        yield running


def test_under_overload_every_call_is_answered_or_told_when_to_come_again(server):
    # Its buffers are there after the first load, its growth is that of the second.
    mix = "assign-crowd:2,focal-s:2"
    drive(server, mix=mix, concurrency=20, seconds=1)
    report, held, text = drive(server, mix=mix, seconds=30 if LONG else 4, overload=FACTOR)
    print(text)
    peak, overload = report.phases
    for phase in (peak, overload):
        for kind in phase.kinds:
            assert kind.answered > 0
            assert kind.errors == {}  # a refusal without a time to come again is one
            assert kind.wrong == 0
    assert sum(kind.refused for kind in overload.kinds) > 0
    assert held.rss_last < 1.05 * held.rss_first + 16
    server.assert_serves()


def test_bodies_that_are_refused_are_not_held(tmp_path):
    with victim(tmp_path, "--max-in-flight", "4") as server:
        drive(server, mix="focal-m", concurrency=4, seconds=1)
        before = server.peak_rss()
        report, _, text = drive(server, mix="focal-m", concurrency=CALLERS, rate=20 * CALLERS, seconds=4)
        print(text)
        (kind,) = report.phases[0].kinds
        assert kind.refused > 0 < kind.answered
        assert server.peak_rss() < before + CALLERS * BODY / 2
        server.assert_serves()
