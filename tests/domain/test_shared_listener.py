"""The socket that takes regions, and peers of every kind of bad manners."""

import os
import socket
import stat
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from lossd.shared_memory import FRAME_BYTES, Answer, Frame, FrameError, Request
from lossd_server.errors import ConfigurationError, InvalidInputError
from lossd_server.shared_memory import Regions, listener
from tests.domain.regions import (
    PAGE,
    Peer,
    bytes_of,
    descriptor_count,
    mapping_count,
    memory_file,
    started,
    wait_until,
)

PASS = Frame(code=Request.PASS, size=PAGE).to_bytes()


@pytest.fixture
def held():
    return Regions(max_bytes=16 * PAGE, max_total_bytes=64 * PAGE)


@pytest.fixture
def path(tmp_path, held):
    """A listener that must take a good region at the end of each test, whatever came before."""
    descriptors = descriptor_count()
    listening = started(str(tmp_path / "shm"), held)
    try:
        yield listening.path
        with Peer(listening.path) as peer, memory_file() as descriptor:
            assert peer.pass_region(descriptor).code is Answer.DONE
        wait_until(lambda: held.held_bytes == 0)
    finally:
        listening.stop()
    assert mapping_count() == 0
    wait_until(lambda: descriptor_count() <= descriptors)


def test_a_region_is_taken_used_and_released(path, held):
    with Peer(path) as peer, memory_file() as descriptor:
        answer = peer.pass_region(descriptor)
        assert (answer.code, answer.size) == (Answer.DONE, PAGE)
        np.frombuffer(held.find(answer.region_id), np.uint8)[5] = 50
        assert bytes_of(descriptor)[5] == 50
        assert peer.release(answer.region_id).code is Answer.DONE
        with pytest.raises(InvalidInputError):
            held.find(answer.region_id)
        assert peer.release(answer.region_id).code is Answer.UNKNOWN_REGION
        assert peer.pass_region(descriptor).code is Answer.DONE


def test_regions_go_with_their_connection(path, held):
    with Peer(path) as peer, memory_file() as descriptor:
        region_id = peer.pass_region(descriptor).region_id
        array = np.frombuffer(held.find(region_id), np.uint8)
    wait_until(lambda: held.count == 0)
    array[:] = 1  # memory in use stays, whoever has left
    assert held.held_bytes == PAGE


def test_one_connection_cannot_release_what_another_passed(path, held):
    with Peer(path) as one, Peer(path) as other, memory_file() as descriptor:
        region_id = one.pass_region(descriptor).region_id
        assert other.release(region_id).code is Answer.UNKNOWN_REGION
        assert len(held.find(region_id)) == PAGE


def test_refusals_leave_the_connection_open(path):
    with Peer(path) as peer, memory_file(seals=0) as bare, memory_file(17 * PAGE) as large:
        assert peer.pass_region(bare).code is Answer.NOT_SEALED
        refused = peer.pass_region(large, 17 * PAGE)
        assert (refused.code, refused.size) == (Answer.TOO_LARGE, 16 * PAGE)
        with memory_file() as good:
            assert peer.pass_region(good, 2 * PAGE).code is Answer.WRONG_SIZE
            assert peer.pass_region(good).code is Answer.DONE


GARBAGE = {
    "one byte": b"x",
    "half a frame": PASS[: FRAME_BYTES // 2],
    "a byte short": PASS[:-1],
    "a byte long": PASS + b"x",
    "much too long": PASS * 2000,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n   ",
    "other magic": b"XSHM" + PASS[4:],
    "unknown request": PASS[:5] + b"\x09" + PASS[6:],
    "an answer": Frame(code=Answer.DONE).to_bytes(),
    "padding that is not 0": PASS[:6] + b"\x01" + PASS[7:],
    "zeros": bytes(FRAME_BYTES),
}


@pytest.mark.parametrize("with_descriptor", [False, True])
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_the_connection(path, name, with_descriptor):
    with Peer(path) as peer, memory_file() as descriptor:
        answer = peer.ask(GARBAGE[name], [descriptor] if with_descriptor else None)
        assert answer is None or answer.code is Answer.MALFORMED
        assert peer.hear() is None


def test_another_version_is_told_ours(path):
    with Peer(path) as peer:
        assert peer.ask(PASS[:4] + b"\x02" + PASS[5:]).code is Answer.OTHER_VERSION
        assert peer.hear() is None


@pytest.mark.parametrize("count", [0, 2, 4, 5, 100, 253])
def test_not_exactly_one_descriptor(path, count):
    with Peer(path) as peer, memory_file() as descriptor:
        assert peer.ask(PASS, [descriptor] * count).code is Answer.MALFORMED
        assert peer.hear() is None


def test_a_descriptor_with_a_release(path):
    with Peer(path) as peer, memory_file() as descriptor:
        release = Frame(code=Request.RELEASE).to_bytes()
        assert peer.ask(release, [descriptor]).code is Answer.MALFORMED


def test_descriptors_with_an_empty_packet(path):
    with Peer(path) as peer, memory_file() as descriptor:
        peer.say(b"", [descriptor])
        assert peer.hear() is None


def test_peers_that_say_nothing_hold_nobody_up(path):
    silent = [Peer(path) for _ in range(10)]
    with Peer(path) as peer, memory_file() as descriptor:
        assert peer.pass_region(descriptor).code is Answer.DONE
    for peer in silent:
        peer.socket.close()


def test_a_peer_that_half_closes(path):
    with Peer(path) as peer:
        peer.socket.shutdown(socket.SHUT_WR)
        assert peer.hear() is None


def test_a_peer_that_does_not_read_is_let_go(path):
    with Peer(path) as deaf, pytest.raises((BrokenPipeError, ConnectionResetError)):
        babble(deaf)


def babble(peer):
    for _ in range(100_000):
        peer.say(Frame(code=Request.RELEASE).to_bytes())


def test_a_peer_that_goes_in_the_middle_of_its_packets(path):
    for _ in range(20):
        with Peer(path) as peer, memory_file() as descriptor:
            for _ in range(5):
                peer.say(PASS, [descriptor])


def test_a_flood_of_connections_leaves_room_for_good_ones(path, monkeypatch, held):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 4)
    flood = [Peer(path) for _ in range(40)]
    with Peer(path) as good, memory_file() as descriptor:
        region_id = good.pass_region(descriptor).region_id
        more = [Peer(path) for _ in range(40)]
        assert good.release(region_id).code is Answer.DONE
    for peer in flood + more:
        peer.socket.close()


def test_connections_that_hold_regions_are_not_pushed_out(path, monkeypatch):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 2)
    with Peer(path) as one, Peer(path) as other, memory_file() as descriptor:
        regions = [peer.pass_region(descriptor).region_id for peer in (one, other)]
        with Peer(path) as third:
            assert third.hear().code is Answer.TOO_MANY_CONNECTIONS
            assert third.hear() is None
        for peer, region_id in zip((one, other), regions, strict=True):
            assert peer.release(region_id).code is Answer.DONE


def test_other_users_are_turned_away(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(listener, "peer_uid", lambda _peer: os.geteuid() + 1)
        with Peer(path) as peer:
            assert peer.hear().code is Answer.OTHER_USER
            assert peer.hear() is None


def test_the_user_is_the_kernels_word(path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert listener.peer_uid(ours) == os.geteuid()


def test_a_failure_of_ours_is_one_connections_trouble(path, held, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(held, "add", lambda *_arguments: 1 // 0)
        with Peer(path) as peer, memory_file() as descriptor:
            assert peer.pass_region(descriptor) is None


def test_without_descriptors_left_nobody_hangs(path, monkeypatch):
    refuse = threading.Event()
    accept = socket.socket.accept

    def accept_or_fail(listening):
        if not refuse.is_set():
            refuse.set()
            raise OSError(24, "Too many open files")
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", accept_or_fail)
    with Peer(path) as peer, memory_file() as descriptor:
        assert peer.pass_region(descriptor).code is Answer.DONE


def test_only_its_user_may_connect(path):
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_a_stop_ends_connections_and_removes_the_socket(tmp_path, held):
    listening = started(str(tmp_path / "shm"), held)
    with Peer(listening.path) as peer, memory_file() as descriptor:
        peer.pass_region(descriptor)
        listening.stop()
        assert peer.hear() is None
    assert (held.count, held.held_bytes, list(tmp_path.iterdir())) == (0, 0, [])


def test_a_socket_that_was_left_behind_is_replaced(tmp_path, held):
    path = str(tmp_path / "shm")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(path)
    started(path, held).stop()


def test_a_path_that_is_taken_is_left_alone(tmp_path, held):
    served = started(str(tmp_path / "shm"), held)
    (tmp_path / "file").write_text("mine")
    for path in (served.path, tmp_path / "file", tmp_path / "no" / "such", tmp_path / ("x" * 120)):
        with pytest.raises(ConfigurationError, match=r"cannot listen on .* for shared memory"):
            started(str(path), held)
    served.stop()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [*Request, *Answer])
def test_frames_say_what_was_put_in(code):
    frame = Frame(code=code, size=2**62 + 1, region_id=bytes(range(16)))
    assert Frame.from_bytes(frame.to_bytes(), type(code)) == frame
    with pytest.raises(FrameError):
        Frame.from_bytes(frame.to_bytes(), Answer if isinstance(code, Request) else Request)


def test_a_frame_is_laid_out_as_documented():
    packet = Frame(code=Request.RELEASE, size=7, region_id=b"0123456789abcdef").to_bytes()
    assert packet == b"LSHM\x01\x02\0\0" + struct.pack("<q", 7) + b"0123456789abcdef"
