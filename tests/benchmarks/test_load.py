"""A load is what was asked for, is counted right, and ends; no time is asserted."""

import io
import json
import math
import os
import time
from array import array
from itertools import islice

import grpc
import numpy as np
import pytest
from rich.console import Console

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_client import InvalidInputError as ClientInvalidInputError
from lossd_server.bench.load.answers import Failure, failure_of, is_right, read_stream_answer, result_bytes
from lossd_server.bench.load.kinds import KINDS, STREAM_WINDOW, Form, payloads
from lossd_server.bench.load.mix import Share, read_mix
from lossd_server.bench.load.pace import Pace
from lossd_server.bench.load.report import Latencies
from lossd_server.bench.load.runner import LoadSettings, run
from lossd_server.bench.load.tally import Tally
from lossd_server.bench.load.watch import Sample, footprint, sample
from lossd_server.errors import InvalidInputError, UnavailableError
from tests.service.support import make_server

LARGE = {"focal-l", "shared-l"}
ASSIGN, FOCAL = KINDS["assign"].method, KINDS["focal-s"].method


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "lossd.sock"
    with make_server(listen=(f"unix:{path}", "127.0.0.1:0")) as running:
        yield running


def drive(json_path=None, **settings):
    text = io.StringIO()
    settings = {"seconds": 0.5, "processes": 1, **settings}
    found = run(LoadSettings(**settings), Console(file=text), json_path)
    return found, text.getvalue()


def test_a_mix_is_read():
    assert read_mix("assign:8, focal-m") == (
        Share(kind="assign", callers=8),
        Share(kind="focal-m", callers=1),
    )


@pytest.mark.parametrize(
    ("concurrency", "callers"), [(16, [10, 5, 1]), (13, [8, 4, 1]), (14, [9, 4, 1]), (1, [1, 1, 1])]
)
def test_concurrency_is_shared_out_by_the_mix(concurrency, callers):
    assert [s.callers for s in read_mix("assign:8,focal-s:4,focal-m:1", concurrency)] == callers


@pytest.mark.parametrize(
    "text", ["", "assign:0", "nonsense:3", "assign,assign", "assign:8;focal-s", "assign:-1"]
)
def test_a_mix_that_is_none_is_refused(text):
    with pytest.raises(InvalidInputError) as caught:
        read_mix(text)
    assert caught.value.field == "mix"


@pytest.fixture(scope="module")
def all_kinds(server):
    """Results of a load of every kind at a time, by kind."""
    mix = ",".join(sorted(KINDS.keys() - LARGE))
    (phase,) = drive(mix=mix, seconds=4, processes=2, target=server.addresses[0])[0].phases
    return {kind.kind: kind for kind in phase.kinds}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - LARGE))
def test_every_kind_is_answered_as_it_is_meant_to_be(all_kinds, kind):
    found = all_kinds[kind]
    assert (found.callers, found.refused, found.wrong) == (1, 0, 0)
    if kind == "bad":
        assert [*found.errors] == ["INVALID_ARGUMENT LABEL_OUT_OF_RANGE"]
        return
    assert found.errors == {}
    assert found.answered > 0
    assert found.latencies.p50 > 0
    assert (found.checked > 0) == (KINDS[kind].form in {Form.UNARY, Form.STREAM})


def test_a_server_of_its_own_is_started_watched_and_overloaded(tmp_path):
    file = tmp_path / "load.json"
    report, text = drive(file, mix="assign:2,shared-m", overload=2, device="cpu", seconds=1)
    fields = json.loads(file.read_text())
    assert [phase["name"] for phase in fields["phases"]] == ["peak", "overload"]
    assert fields["goodput_ratio"] == report.goodput_ratio > 0
    assert [kind["callers"] for kind in fields["phases"][1]["kinds"]] == [4, 2]
    for phase in fields["phases"]:
        assert phase["server"]["rss_peak"] > 50
        assert phase["server"]["threads"][1] > 1
        assert {kind["kind"] for kind in phase["kinds"]} == {"assign", "shared-m"}
    assert "answered under overload" in text
    assert "\x1b" not in text


def test_calls_at_a_rate_are_due_at_their_times(server):
    (phase,) = drive(mix="assign:4", rate=40, seconds=1, target=server.addresses[1])[0].phases
    assert phase.offered_per_second == 40
    assert 0 < phase.kinds[0].answered <= 80  # in two seconds, those of the first are not counted


def test_no_answer_is_an_error_that_says_where():
    with pytest.raises(UnavailableError, match=r"no answer from 127\.0\.0\.1:1"):
        drive(target="127.0.0.1:1")


def test_shared_memory_over_tcp_is_refused(server):
    with pytest.raises(InvalidInputError, match="shared-m"):
        drive(mix="shared-m", target=server.addresses[1])


def test_what_is_late_is_due_in_the_past():
    begins = time.monotonic() - 10
    starts = Pace(begins=begins, ends=begins + 60, interval=2).starts()
    assert list(islice(starts, 5)) == [begins + 2 * i for i in range(5)]


def test_what_is_due_at_the_end_is_not_called():
    ended = time.monotonic()
    assert list(Pace(begins=ended - 10, ends=ended, interval=2).starts()) == []


def test_without_an_interval_each_call_is_due_when_it_is_made():
    began = time.monotonic()
    pace = Pace(begins=began, ends=began + 0.2)
    for due in pace.starts():
        assert due <= time.monotonic()
        pace.pause(60)  # no longer than to the end
    assert began + 0.2 <= time.monotonic() < began + 30


def test_refusals_are_no_errors_and_early_calls_are_not_counted():
    tally = Tally(measured_from=10.0)
    tally.count_answer(9.0, 9.5, 7)
    tally.count_failure(9.0, 9.5, Failure(reason="X"))
    assert tally.calls == 0
    tally.count_answer(10.0, 10.5, 7)
    tally.count_failure(11.0, 11.5, Failure(reason="UNAVAILABLE DRAINING", retry_after=1.0))
    tally.count_failure(10.0, 12.0, Failure(reason="INTERNAL"))
    both = Tally()
    both.add(tally)
    both.add(tally)
    assert (list(both.answered), list(both.refused)) == ([0.5, 0.5], [0.5, 0.5])
    assert (both.refusals, both.errors) == ({"UNAVAILABLE DRAINING": 2}, {"INTERNAL": 2})
    assert (both.bytes_moved, both.last) == (14, 12.0)


def test_quantiles():
    found = Latencies.of(array("d", map(float, np.random.default_rng(0).permutation(1000))))
    assert (found.p50, found.p99, found.p999) == (500, 990, 999)
    assert Latencies.of(array("d")).p99 is None


def test_answers_are_compared_without_their_timings():
    answer = pb.AssignTargetsResponse(results=[pb.TargetResult(positive_counts=[3])])
    expected = result_bytes(ASSIGN, answer.SerializeToString())
    answer.timings.compute_us = 77
    assert is_right(ASSIGN, answer.SerializeToString(), expected)
    answer.results[0].positive_counts[0] = 4
    assert not is_right(ASSIGN, answer.SerializeToString(), expected)
    assert not is_right(ASSIGN, b"\xff", expected)


def test_answers_of_a_stream_are_told_apart():
    response = pb.ComputeLossResponse(results=[pb.LossResult(positive_count=300)] * 40)
    answer = pb.ComputeLossStreamResponse(id=3, response=response)
    assert read_stream_answer(FOCAL, answer.SerializeToString()) == (3, response.SerializeToString())
    answer.id = 300
    assert read_stream_answer(FOCAL, answer.SerializeToString()) == (300, response.SerializeToString())
    answer = pb.ComputeLossStreamResponse(
        id=1, error=pb.Error(code=14, reason=pb.ERROR_REASON_DRAINING, retry_delay_ms=250)
    )
    place, failure = read_stream_answer(FOCAL, answer.SerializeToString())
    assert (place, failure) == (1, Failure(reason="UNAVAILABLE DRAINING", retry_after=0.25))


def test_reasons_are_lossds_own(server):
    with grpc.insecure_channel(server.addresses[1]) as channel, pytest.raises(grpc.RpcError) as caught:
        LossServiceStub(channel).ComputeLoss(pb.ComputeLossRequest())
    assert failure_of(caught.value) == Failure(reason="INVALID_ARGUMENT MISSING_FIELD")
    error = ClientInvalidInputError(grpc.StatusCode.INVALID_ARGUMENT, "no", reason="NOT_FINITE")
    assert failure_of(error) == Failure(reason="INVALID_ARGUMENT NOT_FINITE")


def test_a_stream_has_a_request_for_each_place():
    found = [pb.AssignTargetsStreamRequest.FromString(one) for one in payloads(KINDS["stream-assign"])]
    assert [one.id for one in found] == list(range(1, STREAM_WINDOW + 1))
    assert all(one.request == found[0].request for one in found)


def held(minute, mebibytes):
    size = round(mebibytes * 2**20)
    return Sample(when=minute * 60.0, rss_bytes=size, threads=7, descriptors=9, cpu_seconds=minute * 30.0)


def test_growth_is_a_slope():
    growing = footprint([held(minute, 100 + 2 * minute) for minute in range(60)])
    assert growing.rss_slope == pytest.approx(2)
    assert growing.rss_slope_error == pytest.approx(0, abs=1e-6)
    assert (growing.rss_before, growing.rss_peak, growing.cores) == (100, 218, 0.5)
    assert growing.threads == (7, 7, 7)
    flat = footprint([held(minute, 100 + minute % 2) for minute in range(60)])
    assert abs(flat.rss_slope) <= 2 * flat.rss_slope_error


def test_what_comes_and_goes_slowly_is_no_slope():
    swings = [held(second / 120, 100 + 10 * math.sin(second / 80)) for second in range(1200)]
    found = footprint(swings)
    assert abs(found.rss_slope) < 2 * found.rss_slope_error


def test_a_single_sample_has_no_slope():
    assert footprint([held(0, 100)]).rss_slope == 0


def test_a_process_is_looked_at():
    found = sample(os.getpid())
    assert found.rss_bytes > 1 << 20
    assert found.threads >= 1
    assert found.descriptors >= 3
