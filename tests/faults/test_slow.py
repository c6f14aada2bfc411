"""Peers that never finish what they begin take nothing from those who do."""

import time

import pytest

from tests.faults.slow import WAYS, Peer, large_answers_not_read, slow_peers
from tests.faults.support import eventually, victim

PEERS = 100
"""More than the server has threads for calls."""


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_good_callers_are_served_beside_peers_that_do_not_go_on(server, way):
    server.assert_serves()
    before = server.held()
    with slow_peers(server.address, way, PEERS):
        for _ in range(5):
            server.assert_serves()
    assert eventually(lambda: server.held().descriptors <= before.descriptors + 4)


def test_good_callers_are_served_beside_requests_that_come_byte_by_byte(server):
    def begin(peer):
        peer.begin()
        peer.stream = peer.call("ComputeLoss")

    with slow_peers(server.address, begin, PEERS) as peers:
        for byte in b"\x00\x00\x10\x00\x00\x00\x00\x00":
            for peer in peers:
                try:
                    peer.data(peer.stream, bytes([byte]))
                except (OSError, KeyError):  # the server has had enough of it
                    continue
            server.assert_serves()
            time.sleep(0.2)


def test_places_of_calls_whose_answers_are_not_read_are_free_again(tmp_path):
    # More calls than there are places, and each answer larger than gRPC sends to whoever does not read.
    options = ("--max-in-flight", "32", "--read-seconds", "2")
    with victim(tmp_path, *options) as server, slow_peers(server.address, large_answers_not_read, 20):
        for _ in range(3):
            server.assert_serves()
        assert server.peak_rss() < 1 << 30


def test_calls_that_are_given_up_at_once_wear_nobody_out(server):
    server.assert_serves()
    before = server.held()
    peer = Peer(server.address)
    peer.begin()
    try:
        for _ in range(2_000):
            peer.h2.reset_stream(peer.call("ComputeLoss"))
            peer.send()
    except OSError:  # the server has had enough of it
        pass
    server.assert_serves()
    peer.close()
    assert eventually(lambda: server.held().descriptors <= before.descriptors + 4)
    assert server.held().rss < before.rss + (64 << 20)
