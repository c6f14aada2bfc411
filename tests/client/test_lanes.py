"""Small calls that follow one another go on a stream that stays open; they are answered if it does not."""

import threading
import time

import grpc
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd_client import (
    Client,
    CustomLoss,
    DeadlineError,
    FocalLoss,
    InvalidInputError,
    RetryPolicy,
    UnavailableError,
)
from lossd_client import _lanes as lanes
from tests.client.lane_support import (
    ENOUGH,
    PRED,
    arguments,
    assign,
    evaluate,
    in_use,
    open_lane,
    opened,
)
from tests.client.proxies import cut_after, forward, forward_stream, proxy_of, turn_away
from tests.client.support import same_bits
from tests.client.test_processes import Outside
from tests.client.twins import KINDS, Sync, open_twin
from tests.service import custom_modules
from tests.service.metrics import eventually, value
from tests.service.support import make_server

UNTIL_THEN = [forward] * lanes.RAPID_CALLS

pytestmark = pytest.mark.usefixtures("rapid")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def twin(kind, lane_server):
    with open_twin(kind, lane_server.addresses[0]) as made:
        yield made


def test_results_are_the_same_on_and_off_a_lane(lane_server, twin):
    off = [evaluate(twin, seed) for seed in range(lanes.RAPID_CALLS)]
    on = [evaluate(twin, seed) for seed in range(lanes.RAPID_CALLS)]
    assert opened(lane_server) == 1
    for one, other in zip(off, on, strict=True):
        assert one.loss == other.loss
        assert same_bits(one.gradients["inputs"], other.gradients["inputs"])
        assert one.raw_sums == other.raw_sums
    handled = {"wanted": "grpc_server_handled_total", "grpc_method": "ComputeLoss", "grpc_code": "OK"}
    eventually(lambda: value(lane_server, **handled) == 2 * lanes.RAPID_CALLS)


def test_targets_have_a_lane_of_their_own(lane_server, twin):
    found = [assign(twin) for _ in range(ENOUGH)]
    open_lane(twin)
    assert (opened(lane_server), opened(lane_server, "AssignTargets")) == (1, 1)
    assert all(same_bits(each.ltrb, found[0].ltrb) for each in found)


def test_calls_now_and_then_go_by_themselves(lane_server, twin, monkeypatch):
    monkeypatch.setattr(lanes, "RAPID_SECONDS", 0.0)
    open_lane(twin)
    assert opened(lane_server) == 0


def test_larger_calls_go_by_themselves(lane_server, twin):
    for _ in range(ENOUGH):
        twin.call("compute_loss", FocalLoss(), *arguments(n=lanes.LARGEST_BYTES // 20))
    assert opened(lane_server) == 0


def test_questions_about_the_server_go_by_themselves(lane_server, twin):
    for _ in range(ENOUGH):
        twin.call("server_info")
    assert opened(lane_server) == 0


@pytest.mark.parametrize(
    "settings",
    [{"hedge_after": 30.0}, {"token": "secret", "insecure": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_said_of_each_call_holds_for_calls_alone(lane_server, kind, settings):
    with open_twin(kind, lane_server.addresses[0], **settings) as twin:
        open_lane(twin)
    assert opened(lane_server) == 0


def test_a_channel_of_the_callers_carries_calls_alone(lane_server):
    with grpc.insecure_channel(lane_server.addresses[0]) as channel:
        open_lane(Sync(Client(channel=channel)))
    assert opened(lane_server) == 0


def test_a_refusal_is_the_error_of_a_call_and_the_lane_goes_on(lane_server, twin):
    logits, labels = arguments()
    labels[3] = 77
    errors = []
    for _ in range(ENOUGH):
        with pytest.raises(InvalidInputError) as caught:
            twin.call("compute_loss", FocalLoss(), logits, labels)
        errors.append(caught.value)
    assert evaluate(twin).loss > 0
    assert opened(lane_server) == 1
    assert all(vars(error) == vars(errors[0]) for error in errors)
    assert str(errors[-1]) == str(errors[0])


def test_one_lasts_for_a_while_and_another_takes_its_place(lane_server, twin, monkeypatch):
    monkeypatch.setattr(lanes, "USE_SECONDS", 0.1)
    ends = time.monotonic() + 1.0
    while time.monotonic() < ends:
        evaluate(twin)
        assert in_use(lane_server) <= 2  # the one before may be about to end
    assert opened(lane_server) >= 3
    ended = {"grpc_method": "ComputeLossStream", "grpc_code": "OK"}
    eventually(lambda: value(lane_server, "grpc_server_handled_total", **ended) >= opened(lane_server) - 1)


def test_closing_ends_it_and_a_later_call_connects_again(lane_server, kind):
    with open_twin(kind, lane_server.addresses[0]) as twin:
        open_lane(twin)
        assert in_use(lane_server) == 1
    eventually(lambda: in_use(lane_server) == 0)


def test_where_there_is_no_lane_left_calls_are_made(kind):
    with make_server(max_streams=1) as server, open_twin(kind, server.addresses[0]) as first:
        open_lane(first)
        with open_twin(kind, server.addresses[0]) as second:
            open_lane(second)
            assert opened(server) == 2
            # It does not ask again so soon.
            assert value(server, "lossd_refusals_total", reason="TOO_MANY_STREAMS") == 1


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_one_that_breaks_is_not_missed(target, kind, twin, answers):
    expected = evaluate(twin).loss
    actions = [*UNTIL_THEN, cut_after(answers)]
    with proxy_of(target, *actions) as proxy, open_twin(kind, proxy.address, retries=None) as through:
        assert all(evaluate(through).loss == expected for _ in range(ENOUGH + 6))
        assert proxy.calls.count("ComputeLossStream") == 1  # another one is not tried so soon


def test_a_server_that_is_busy_is_left_alone_and_asked_again_by_call(target, kind):
    actions = [*UNTIL_THEN, turn_away(2)]
    policy = RetryPolicy(initial_backoff=0.01)
    with proxy_of(target, *actions) as proxy, open_twin(kind, proxy.address, retries=policy) as twin:
        assert len({float(evaluate(twin).loss) for _ in range(ENOUGH)}) == 1
        assert proxy.items == [[1, 2]]
        assert proxy.calls.count("ComputeLoss") == ENOUGH - 1


def test_one_after_the_other_go_round_all_servers(target, kind, monkeypatch):
    monkeypatch.setattr(lanes, "USE_SECONDS", 0.1)
    with proxy_of(target) as one, proxy_of(target) as other:
        with open_twin(kind, [one.address, other.address]) as twin:
            ends = time.monotonic() + 20
            while time.monotonic() < ends and not (one.items and other.items):
                evaluate(twin)
        assert one.items
        assert other.items


def test_a_server_that_dies_and_comes_back_is_not_missed(kind):
    first = Outside()
    with open_twin(kind, first.target, timeout=40) as twin:
        try:
            open_lane(twin)
        finally:
            first.kill()
        again = Outside(first.port)
        try:
            open_lane(twin)
        finally:
            again.kill()


def test_a_server_that_stopped_is_as_unavailable_as_ever(kind):
    with make_server() as server, open_twin(kind, server.addresses[0], retries=None) as twin:
        open_lane(twin)
        server.stop()
        with pytest.raises(UnavailableError):
            evaluate(twin)


def test_a_call_ends_at_its_deadline(lane_server, kind):
    with open_twin(kind, lane_server.addresses[0], timeout=60) as twin:
        open_lane(twin)
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="Deadline Exceeded") as caught:
            twin.call("compute_loss", CustomLoss("Held"), PRED, timeout=0.5)
        assert 0.5 <= time.monotonic() - began < 20
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert opened(lane_server) == 1
        custom_modules.release.set()
        assert evaluate(twin).loss > 0


def test_a_call_has_all_of_its_time(lane_server, kind, monkeypatch):
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(lanes, "USE_SECONDS", 0.5)
    monkeypatch.setattr(lanes, "FIRST_SECONDS", 0.2)
    with open_twin(kind, lane_server.addresses[0], timeout=4) as twin:
        open_lane(twin)
        threading.Timer(2.5, custom_modules.release.set).start()
        assert twin.call("compute_loss", CustomLoss("Held"), PRED).loss == 2
        eventually(lambda: value(lane_server, "lossd_in_flight") == 0)
        assert value(lane_server, "grpc_server_handled_total", grpc_method="ComputeLoss") == ENOUGH + 1


def test_what_lets_no_request_through_before_all_have_come_is_found_out(target, kind, monkeypatch):
    monkeypatch.setattr(lanes, "FIRST_SECONDS", 0.3)

    def gather(proxy, method, requests, call):
        yield from forward_stream(proxy, method, iter(list(requests)), call)

    with proxy_of(target, *UNTIL_THEN, gather) as proxy, open_twin(kind, proxy.address) as twin:
        began = time.monotonic()
        for _ in range(5):
            open_lane(twin)
        assert time.monotonic() - began < 20
        assert proxy.calls.count("ComputeLossStream") == 1


def test_an_answer_to_another_request_is_no_answer(target, kind, twin):
    def confuse(proxy, method, requests, call):
        for data in forward_stream(proxy, method, requests, call):
            answer = pb.ComputeLossStreamResponse.FromString(data)
            answer.id += 1
            yield answer.SerializeToString()

    expected = evaluate(twin).loss
    with proxy_of(target, *UNTIL_THEN, confuse) as proxy, open_twin(kind, proxy.address) as through:
        assert all(evaluate(through).loss == expected for _ in range(2 * ENOUGH))
        assert proxy.calls.count("ComputeLossStream") == 1


def test_items_of_a_batch_in_several_messages_are_counted_on_a_lane_too(small_target, kind):
    items = [arguments(n=2_500) for _ in range(21)]
    items[-1][1][0] = 99
    errors = []
    with open_twin(kind, small_target) as twin:
        for _ in range(2):
            with pytest.raises(InvalidInputError) as caught:
                twin.call("compute_losses", FocalLoss(), items)
            errors.append(caught.value)
            open_lane(twin)
    assert [error.field for error in errors] == ["items[20].focal.targets"] * 2
    assert vars(errors[0]) == vars(errors[1])
