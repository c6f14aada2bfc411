"""Mixed traffic for a while: memory, threads and descriptors stay where they are."""

import pytest

from tests.faults.driving import drive
from tests.faults.support import LONG, eventually

MIX = "assign:4,focal-s:2,focal-m,giou,fcos,stream-assign,stream-m,shared-m,bad"
MINUTES, WARM_UP_MINUTES = 10, 3


@pytest.mark.timeout(1200 if LONG else 300)
def test_mixed_traffic_leaves_no_trace(server):
    # Its buffers and the threads of its pools are there then, and in minutes all that its heap is to hold.
    drive(server, mix=MIX, shared=True, seconds=60 * WARM_UP_MINUTES if LONG else 3)
    before = server.held()
    seconds = 60 * MINUTES if LONG else 15
    report, held, text = drive(server, mix=MIX, shared=True, seconds=seconds)
    print(text)
    print(f"slope of memory: {held.rss_slope:+.3f} ± {held.rss_slope_error:.3f} MiB a minute")
    for kind in report.phases[0].kinds:
        assert kind.wrong == 0
        if kind.kind != "bad":
            assert (kind.errors, kind.refused) == ({}, 0)
            assert kind.answered > 0
    assert held.rss_last < 1.10 * held.rss_first + 16
    if LONG:
        # Within what is left to chance: a leak of 100 bytes a call would be 5 MiB a minute.
        assert held.rss_slope < 3 * held.rss_slope_error
    after = server.held
    assert eventually(lambda: after().regions == 0)
    assert eventually(lambda: after().descriptors <= before.descriptors + 4)
    assert eventually(lambda: after().threads <= before.threads + 8)
    server.assert_serves()
