"""Refused requests in the log: a line each, and not too many of them."""

import pytest
from structlog.testing import capture_logs

from lossd_server.errors import InvalidInputError, Reason, UnavailableError
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.refusals import LINES_PER_SECOND, Refusals
from lossd_server.rpc.status import MAX_VALUE_LENGTH

BAD_LABEL = InvalidInputError(Reason.LABEL_OUT_OF_RANGE, "is 80, want -1..79", field="items[0].focal.targets")
BUSY = UnavailableError(Reason.TOO_MANY_STREAMS, "32 streams are open")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def refusals(clock):
    return Refusals(Metrics(), clock)


def test_a_line_names_method_reason_field_and_peer(refusals):
    with capture_logs() as lines:
        refusals.record("ComputeLoss", BAD_LABEL, "ipv4:127.0.0.1:1")
    assert lines == [
        {
            "event": "refused",
            "log_level": "warning",
            "method": "ComputeLoss",
            "code": "INVALID_ARGUMENT",
            "reason": "LABEL_OUT_OF_RANGE",
            "field": "items[0].focal.targets",
            "message": "is 80, want -1..79",
            "peer": "ipv4:127.0.0.1:1",
        }
    ]


def test_a_flood_is_a_few_lines_a_second_and_their_number(refusals, clock):
    with capture_logs() as lines:
        for _ in range(1000):
            refusals.record("ComputeLoss", BUSY, "peer")
        assert len(lines) == LINES_PER_SECOND
        clock.now += 1.0
        refusals.record("ComputeLoss", BUSY, "peer")
        refusals.record("ComputeLoss", BUSY, "peer")
    assert [line.get("unwritten") for line in lines[LINES_PER_SECOND:]] == [1000 - LINES_PER_SECOND, None]


def test_a_flood_of_one_reason_hides_no_other(refusals):
    with capture_logs() as lines:
        for _ in range(100):
            refusals.record("ComputeLoss", BUSY, "peer")
        refusals.record("ComputeLoss", BAD_LABEL, "peer")
    assert lines[-1]["reason"] == "LABEL_OUT_OF_RANGE"
    assert "unwritten" not in lines[-1]


def test_every_refusal_is_counted_whether_written_or_not():
    metrics = Metrics()
    refusals = Refusals(metrics, Clock())
    with capture_logs():
        for _ in range(100):
            refusals.record("ComputeLoss", BUSY, "peer")
    labels = {"method": "ComputeLoss", "reason": "TOO_MANY_STREAMS"}
    assert metrics.registry.get_sample_value("lossd_refusals_total", labels) == 100


def test_what_went_unwritten_is_said_at_the_end_once(refusals):
    with capture_logs() as lines:
        for _ in range(LINES_PER_SECOND + 5):
            refusals.record("ComputeLoss", BUSY, "peer")
        refusals.record("ComputeLoss", BAD_LABEL, "peer")
        refusals.close()
        refusals.close()
    ends = lines[LINES_PER_SECOND + 1 :]
    assert [(line["reason"], line["unwritten"]) for line in ends] == [("TOO_MANY_STREAMS", 5)]


def test_a_caller_cannot_fill_the_log_with_one_field(refusals):
    error = InvalidInputError(Reason.UNEXPECTED_FIELD, "m" * 10**6, field=f"tensors[{'x' * 10**6}]")
    with capture_logs() as (lines):
        refusals.record("ComputeLoss", error, "peer")
    assert len(lines[0]["field"]) == len(lines[0]["message"]) == MAX_VALUE_LENGTH
