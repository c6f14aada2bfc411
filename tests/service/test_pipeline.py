"""The pipeline of one stream by itself: what ends it, and what becomes of requests that come too late."""

import collections
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lossd_server.engine import Admission
from lossd_server.errors import InvalidInputError, Reason, UnavailableError
from lossd_server.rpc.pipeline import Pipeline
from tests.service.metrics import eventually


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def make_pipeline(pool, check=lambda: None, **settings):
    return Pipeline(pool, Admission(max_requests=8, max_bytes=1 << 20), check, **settings)


def answered(answers):
    """The answers that came before the stream failed, sorted, and why it did."""
    found = []
    with pytest.raises((InvalidInputError, UnavailableError)) as caught:
        collections.deque(map(found.append, answers), maxlen=0)
    return sorted(found), caught.value


def test_everything_is_answered_and_the_stream_ends_with_its_requests(pool):
    tasks = (lambda data=bytes([n]): data for n in range(20))
    assert sorted(make_pipeline(pool).answers(tasks)) == [bytes([n]) for n in range(20)]


def test_what_cannot_be_read_ends_the_stream_once_all_before_it_is_answered(pool):
    def tasks():
        yield lambda: b"first"
        yield lambda: b"second"
        raise InvalidInputError(Reason.MALFORMED_REQUEST, "is no message")

    found, error = answered(make_pipeline(pool).answers(tasks()))
    assert found == [b"first", b"second"]
    assert error.reason is Reason.MALFORMED_REQUEST


def test_what_comes_once_the_server_stops_is_dropped_and_the_caller_is_told_why(pool):
    read = []

    def tasks():
        for n in range(9):
            read.append(n)
            yield lambda data=bytes([n]): data

    def check():
        if len(read) == 2:
            raise UnavailableError(Reason.DRAINING, "the server is stopping")

    found, error = answered(make_pipeline(pool, check).answers(tasks()))
    assert found == [b"\x00", b"\x01"]
    assert error.reason is Reason.DRAINING
    eventually(lambda: read == list(range(9)))  # or else the caller would wait for room to send in


def test_where_there_is_no_time_left_a_stream_ends_at_once(pool):
    silent = threading.Event()

    def tasks():
        yield lambda: b"answer"
        silent.wait(60)
        yield lambda: b"never"

    def check():
        if began.is_set():
            raise UnavailableError(Reason.DRAINING, "the server is stopping")

    began = threading.Event()
    pipeline = make_pipeline(pool, check, linger_until=lambda: 0.0)
    answers = pipeline.answers(tasks())
    assert next(answers) == b"answer"
    began.set()
    pipeline.wake()
    found, error = answered(answers)
    silent.set()
    assert (found, error.reason) == ([], Reason.DRAINING)
