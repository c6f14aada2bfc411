"""One request in chunks: answered as one that comes whole, and judged before all of it has come."""

import threading
import time
from itertools import pairwise

import grpc
import numpy as np
import pytest

from lossd.headers import CANCELLED_FOR, REQUEST_BYTES
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2 import ComputeLossInChunksRequest as Chunk
from tests.service import custom_modules
from tests.service.bad_requests import LOSS
from tests.service.metrics import eventually, value
from tests.service.support import (
    CASES,
    connect,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
    refusal_of,
)

MEBIBYTE = 1 << 20
GOOD = good_loss_request().SerializeToString()
UNLIMITED = [("grpc.max_receive_message_length", -1)]


def cut(message, count=3):
    """The chunks of a message."""
    edges = np.linspace(0, len(message), count + 1, dtype=int)
    for index, (start, stop) in enumerate(pairwise(edges)):
        yield Chunk(message_bytes=0 if index else len(message), data=message[start:stop])


def ask(stub, chunks, **settings):
    """The answer to a request in chunks."""
    answer = list(stub.ComputeLossInChunks(iter(chunks), timeout=60, **settings))
    message = b"".join(chunk.data for chunk in answer)
    assert [chunk.message_bytes for chunk in answer] == [len(message)] + [0] * (len(answer) - 1)
    return pb.ComputeLossResponse.FromString(message)


def refusal_in_chunks(stub, chunks):
    return refusal(lambda: ask(stub, chunks))


def is_let_in(server, count):
    return lambda: server._admission.requests == count


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_the_whole_request(stub, name):
    case = CASES[name]
    arrays = [case.arrays(np.random.default_rng(seed), 2 + seed) for seed in range(2)]
    request = loss_request(case.config, arrays, gradients=case.module.differentiable)
    for count in (1, 2, 7):
        answer = ask(stub, cut(request.SerializeToString(), count))
        assert answer.results == stub.ComputeLoss(request).results


def test_large_messages_come_and_go_in_chunks(server):
    shape = (4, 80, 60, 60)
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.standard_normal(shape, np.float32),
        "targets": rng.integers(-1, 80, (4, 60, 60)),
    }
    request = loss_request(losses_pb2.FocalLoss(), [arrays], gradients=["inputs"])
    with grpc.insecure_channel(server.addresses[0], options=UNLIMITED) as channel:
        call = channel.stream_stream(
            "/lossd.v1.LossService/ComputeLossInChunks",
            request_serializer=Chunk.SerializeToString,
            response_deserializer=pb.ComputeLossInChunksResponse.FromString,
        )
        answer = list(call(cut(request.SerializeToString(), 5), timeout=60))
        whole = channel.unary_unary(
            "/lossd.v1.LossService/ComputeLoss",
            request_serializer=pb.ComputeLossRequest.SerializeToString,
            response_deserializer=pb.ComputeLossResponse.FromString,
        )(request)
    assert len(answer) > 4
    assert max(len(chunk.data) for chunk in answer) == MEBIBYTE
    found = pb.ComputeLossResponse.FromString(b"".join(chunk.data for chunk in answer))
    assert found.results == whole.results


@pytest.mark.parametrize("bad", LOSS, ids=lambda bad: bad.name)
def test_what_is_wrong_with_a_request_is_told_as_ever(stub, bad):
    message = bad.request().SerializeToString()
    found = refusal_in_chunks(stub, cut(message))
    assert (found.code.name, found.reason, found.metadata.get("field", "")) == (
        bad.code,
        bad.reason,
        bad.field,
    )
    assert found == refusal(stub.ComputeLoss, bad.request())


@pytest.mark.parametrize(
    ("chunks", "message", "message_bytes", "length"),
    [
        ([], "message_bytes: is 0, but the chunks ended after 0 bytes", 0, 0),
        ([Chunk(data=GOOD)], "message_bytes: is 0 in the first chunk, want at least 1", 0, 0),
        ([Chunk(message_bytes=-5, data=GOOD)], "message_bytes: is -5 in the first chunk", -5, 0),
        ([*cut(GOOD)][:2], "but the chunks ended after", len(GOOD), 2 * len(GOOD) // 3),
        ([Chunk(message_bytes=2, data=GOOD)], "message_bytes: is 2, but", 2, len(GOOD)),
    ],
    ids=["none", "no length", "negative", "cut short", "longer"],
)
def test_chunks_that_are_no_message_are_malformed(stub, chunks, message, message_bytes, length):
    found = refusal_in_chunks(stub, chunks)
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert message in found.message
    assert found.violations == ("message_bytes",)
    assert (found.metadata["value"], found.metadata["length"]) == (str(message_bytes), str(length))
    assert ask(stub, cut(GOOD)).results


def test_bytes_that_are_no_chunk_are_malformed(server, stub):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        call = channel.stream_stream("/lossd.v1.LossService/ComputeLossInChunks")
        found = refusal(lambda: list(call(iter([b"\xff\xfe\xfd junk"]), timeout=60)))
    assert (found.reason, found.metadata["type"]) == (
        "MALFORMED_REQUEST",
        "lossd.v1.ComputeLossInChunksRequest",
    )
    assert found.metadata["length"] == "8"
    assert ask(stub, cut(GOOD)).results


def test_many_more_chunks_than_it_takes_are_malformed(stub):
    found = refusal_in_chunks(stub, [Chunk(message_bytes=len(GOOD)), *[Chunk()] * 1000])
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "but 65 chunks have come with 0 bytes of it" in found.message
    assert ask(stub, cut(GOOD)).results


def test_empty_chunks_mean_nothing(stub):
    first, *others = cut(GOOD)
    empty = Chunk()
    head = Chunk(message_bytes=len(GOOD))
    assert ask(stub, [head, empty, Chunk(data=first.data), empty, *others, empty]).results


def test_what_is_longer_than_the_server_reads_is_refused_by_its_first_chunk():
    with make_server(max_message_bytes=MEBIBYTE) as server, connect(server) as stub:
        found = refusal_in_chunks(stub, [Chunk(message_bytes=MEBIBYTE + 1)])
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert (found.metadata["field"], found.metadata["value"]) == ("message_bytes", str(MEBIBYTE + 1))
        assert found.metadata["limit"] == str(MEBIBYTE)
        assert ask(stub, cut(GOOD)).results


class Withheld:
    """A call whose chunks beyond the first do not come until it is let go on."""

    def __init__(self, stub, first, rest=(), **settings):
        self.go_on = threading.Event()

        def chunks():
            yield first
            self.go_on.wait(60)
            yield from rest

        self.call = stub.ComputeLossInChunks(chunks(), timeout=60, **settings)

    def error(self):
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        self.go_on.set()
        return caught.value


def test_bytes_count_from_the_first_chunk_on_and_no_longer_than_the_call():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE}
    with make_server(**limits) as server, connect(server) as stub:
        first = Withheld(stub, Chunk(message_bytes=MEBIBYTE))
        eventually(lambda: value(server, "lossd_in_flight_bytes") == MEBIBYTE)
        found = refusal_of(Withheld(stub, Chunk(message_bytes=1)).error())
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert found.retry_seconds > 0
        first.call.cancel()
        first.go_on.set()
        eventually(lambda: server._admission.bytes == 0)
        assert ask(stub, cut(GOOD)).results
        eventually(lambda: server._admission.bytes == 0)
        eventually(is_let_in(server, 0))


def test_bytes_that_are_declared_are_refused_before_the_first_chunk():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE}
    with make_server(**limits) as server, connect(server) as stub:
        first = Withheld(stub, Chunk(message_bytes=MEBIBYTE))
        eventually(lambda: server._admission.bytes == MEBIBYTE)
        call = Withheld(stub, Chunk(), metadata=[(REQUEST_BYTES, "1")])
        assert refusal_of(call.error()).reason == "OVERLOADED"
        first.call.cancel()
        first.go_on.set()


def test_chunks_that_do_not_come_make_room_for_those_that_do():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE, "read_seconds": 600}
    with make_server(**limits) as server, connect(server) as stub:
        silent = Withheld(stub, Chunk(message_bytes=MEBIBYTE))
        eventually(lambda: server._admission.bytes == MEBIBYTE)
        eventually(lambda: is_answered(stub))
        assert silent.error().code() is grpc.StatusCode.CANCELLED


def test_chunks_that_keep_coming_are_waited_for_whoever_else_wants_their_place():
    limits = {"max_message_bytes": MEBIBYTE, "max_in_flight_bytes": MEBIBYTE, "read_seconds": 600}
    with make_server(**limits) as server, connect(server) as stub, connect(server) as other:
        is_over = threading.Event()

        def knock():
            while not is_over.wait(0.02):
                is_answered(other)

        def slowly():
            for chunk in cut(message, 24):
                yield chunk
                time.sleep(0.1)  # in all more than the second that nothing may come for

        unknown = b"\x9a\x06" + b"\x80\x80\x20" + bytes(512 << 10)  # more than half of what there is
        message = GOOD + unknown
        others = threading.Thread(target=knock)
        others.start()
        try:
            assert ask(stub, slowly()).results
        finally:
            is_over.set()
            others.join()
        assert value(server, "lossd_refusals_total", reason="OVERLOADED") > 0


def is_answered(stub):
    try:
        return bool(ask(stub, cut(GOOD)).results)
    except grpc.RpcError:
        return False


def handled(server):
    """How many calls in chunks have ended, and how many of them as cancelled."""
    labels = {"grpc_method": "ComputeLossInChunks"}
    name = "grpc_server_handled_total"
    return value(server, name, **labels), value(server, name, **labels, grpc_code="CANCELLED")


def test_a_call_that_its_caller_ends_before_it_has_come_is_no_fault_of_the_servers():
    with make_server() as server, connect(server) as stub:
        call = Withheld(stub, next(cut(GOOD)))
        eventually(lambda: server._admission.bytes == len(GOOD))
        call.call.cancel()
        call.go_on.set()
        eventually(lambda: handled(server) == (1, 1))


def test_neither_is_one_that_is_ended_while_it_is_answered():
    with make_server() as server, connect(server) as stub:
        call = stub.ComputeLossInChunks(cut(large_request(), 30), timeout=60)
        assert next(call).message_bytes > 24 * MEBIBYTE
        call.cancel()
        eventually(lambda: handled(server) == (1, 1))


def test_chunks_that_do_not_come_end_their_call():
    with make_server(read_seconds=0.1) as server, connect(server) as stub:
        for count in range(1, 21):
            call = Withheld(stub, next(cut(GOOD)))
            assert call.error().code() is grpc.StatusCode.CANCELLED
            assert dict(call.call.initial_metadata())[CANCELLED_FOR] == "BODY_TOO_SLOW"
            eventually(lambda count=count: value(server, "lossd_refusals_total") == count)
        assert value(server, "lossd_refusals_total", reason="BODY_TOO_SLOW") == count
        eventually(is_let_in(server, 0))
        eventually(lambda: server._admission.bytes == 0)
        assert ask(stub, cut(GOOD)).results


def test_a_caller_that_leaves_between_chunks_leaves_nothing_behind():
    with make_server() as server, connect(server) as stub:
        for _ in range(20):
            call = Withheld(stub, Chunk(message_bytes=8 * MEBIBYTE, data=bytes(MEBIBYTE)))
            eventually(lambda: server._admission.bytes == 8 * MEBIBYTE)
            call.call.cancel()
            call.go_on.set()
            eventually(holds_one_idle_buffer(server))
        eventually(is_let_in(server, 0))
        eventually(lambda: value(server, "lossd_in_flight") == 0)


@pytest.mark.parametrize("count", [1, 9], ids=["cut short", "a label out of range"])
def test_a_large_request_that_is_refused_leaves_nothing_behind(count):
    arrays = {"inputs": np.zeros((25_000, 80), np.float32), "targets": np.full(25_000, 80)}
    message = loss_request(losses_pb2.FocalLoss(), [arrays]).SerializeToString()
    with make_server() as server, connect(server) as stub:
        for _ in range(20):
            found = refusal_in_chunks(stub, [*cut(message, 9)][:count])
            assert found.code is grpc.StatusCode.INVALID_ARGUMENT
            eventually(holds_one_idle_buffer(server))
        eventually(is_let_in(server, 0))


def holds_one_idle_buffer(server):
    """The memory of every request is used again for the next, without a collector of cycles."""
    return lambda: server._admission.bytes == 0 and server._engine.buffers.idle_bytes == 8 * MEBIBYTE


def large_request():
    shape = (8, 80, 100, 100)
    arrays = {"inputs": np.zeros(shape, np.float32), "targets": np.zeros((8, 100, 100), np.int64)}
    return loss_request(losses_pb2.FocalLoss(), [arrays], gradients=["inputs"]).SerializeToString()


def test_an_answer_that_is_not_taken_ends_its_call():
    with make_server(read_seconds=1.0) as server, connect(server) as stub:
        call = stub.ComputeLossInChunks(cut(large_request(), 30), timeout=60)
        assert next(call).message_bytes > 24 * MEBIBYTE
        eventually(is_let_in(server, 0))  # hung up on
        eventually(lambda: server._engine.buffers.idle_bytes > 24 * MEBIBYTE)
        assert ask(stub, cut(GOOD)).results
        with pytest.raises(grpc.RpcError):
            list(call)


def test_a_request_that_comes_once_the_server_stops_is_refused_so(held):
    server = make_server(load=("tests.service.custom_modules:Held",), drain_seconds=30)
    server.start()
    with connect(server) as stub:
        running = held(stub)
        first, *rest = cut(GOOD)
        late = Withheld(stub, first, rest)
        eventually(is_let_in(server, 2))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: server._admission._draining)
        late.go_on.set()
        found = refusal_of(late.error())
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        custom_modules.release.set()
        assert running.result(30).results
        stopping.join(60)
        assert not stopping.is_alive()


def test_it_is_counted_as_a_call_of_its_own_and_a_request_as_any():
    with make_server() as server, connect(server) as stub:
        ask(stub, cut(GOOD, 4))
        refusal_in_chunks(stub, [Chunk(data=b"x")])
        labels = {"grpc_service": "lossd.v1.LossService", "grpc_method": "ComputeLossInChunks"}
        eventually(lambda: value(server, "grpc_server_handled_total", **labels) == 2)
        assert value(server, "grpc_server_handled_total", **labels, grpc_code="OK") == 1
        assert value(server, "grpc_server_msg_received_total", **labels) == 5
        assert value(server, "lossd_request_bytes_count", method="ComputeLoss") == 1
        assert value(server, "lossd_request_bytes_sum", method="ComputeLoss") == len(GOOD)
        assert value(server, "lossd_refusals_total", method="ComputeLoss", reason="MALFORMED_REQUEST") == 1


def test_it_takes_no_place_among_streams():
    with make_server(max_streams=1) as server, connect(server) as stub:
        go_on = threading.Event()
        stream = stub.ComputeLossStream(iter(go_on.wait, True), timeout=60)
        eventually(lambda: server._handlers._streams.used == 1)
        assert ask(stub, cut(GOOD)).results
        stream.cancel()
        go_on.set()


TOKENS = """
[bob]
token = "bob-0123456789abcdef"
requests_per_second = 2
[carol]
token = "carol-0123456789abcdef"
bytes_per_second = 100
"""


@pytest.mark.parametrize(("name", "unit"), [("bob", "requests"), ("carol", "bytes")])
def test_a_token_pays_for_one_request_and_for_all_of_its_bytes(tmp_path, name, unit):
    (tmp_path / "tokens.toml").write_text(TOKENS)
    bearing = {"metadata": [("authorization", f"Bearer {name}-0123456789abcdef")]}
    with make_server(tokens=str(tmp_path / "tokens.toml")) as server, connect(server) as stub:
        assert refusal_in_chunks(stub, cut(GOOD)).reason == "UNAUTHENTICATED"
        assert ask(stub, cut(GOOD, 20), **bearing).results
        refusals = (refusal_if_any(stub, bearing) for _ in range(100))
        found = next(filter(None, refusals))
        assert (found.reason, found.metadata["unit"]) == ("RATE_LIMITED", f"{unit} a second")
        assert refusal(stub.AssignTargets, good_assign_request()).reason == "UNAUTHENTICATED"


def refusal_if_any(stub, bearing):
    try:
        ask(stub, cut(GOOD, 20), **bearing)
    except grpc.RpcError as error:
        return refusal_of(error)
    return None
