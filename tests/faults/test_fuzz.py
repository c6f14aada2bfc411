"""Whatever bytes come, each call is answered or cleanly refused, and the server goes on."""

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lossd.v1 import loss_service_pb2 as pb
from tests.domain.wire_bytes import message_bytes
from tests.faults.support import LONG, Victim, victim
from tests.fuzz.attack import CLEAN, SERVICE, Attack
from tests.fuzz.fuzz_server import SETTINGS
from tests.service.support import refusal_of

REQUESTS = {
    "ComputeLoss": pb.ComputeLossRequest,
    "AssignTargets": pb.AssignTargetsRequest,
    "ComputeLossInChunks": pb.ComputeLossInChunksRequest,
    "ComputeLossStream": pb.ComputeLossStreamRequest,
    "AssignTargetsStream": pb.AssignTargetsStreamRequest,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Victim]:
    limits = [f"--{name}={value}" for name, value in SETTINGS.items()]
    with victim(tmp_path_factory.mktemp("fuzz"), *limits) as running:
        yield running
        running.assert_serves()


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as made:
        yield made


@pytest.mark.timeout(3600 if LONG else 300)
def test_spoilt_requests_are_answered_or_refused_with_a_reason(server):
    attack = Attack(server.address, seed=1)
    attack.run(100_000 if LONG else 3_000)
    answered = {method for method, outcome in attack.outcomes if outcome == "OK"}
    assert answered == REQUESTS.keys()  # many are good in spite of it all: not everything stops at the parser
    server.assert_serves()


@pytest.mark.parametrize("method", REQUESTS)
def test_bytes_in_any_form_of_the_wire_are_answered_or_refused_with_a_reason(channel, method):
    streamed = method.endswith(("Stream", "InChunks"))
    call: Any = getattr(channel, "stream_stream" if streamed else "unary_unary")(f"{SERVICE}/{method}")

    @settings(max_examples=5_000 if LONG else 100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(message_bytes(REQUESTS[method].DESCRIPTOR))
    def check(data):
        try:
            list(call(iter([data]), timeout=60)) if streamed else call(data, timeout=60)
        except grpc.RpcError as error:
            found = refusal_of(error)
            assert found.code in CLEAN
            assert found.domain == "lossd"

    check()


_PRINTABLE = st.text([chr(code) for code in range(0x20, 0x7F)], max_size=2_000)
_PAIRS = st.one_of(
    st.tuples(st.sampled_from(["x-a", "authorization", "cookie", "user-agent"]), _PRINTABLE),
    st.tuples(st.sampled_from(["x-bin", "grpc-tags-bin", "grpc-trace-bin"]), st.binary(max_size=2_000)),
)


@settings(max_examples=500 if LONG else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_PAIRS, max_size=20))
def test_metadata_of_any_kind_is_taken_or_refused(channel, metadata):
    call: Any = channel.unary_unary(f"{SERVICE}/GetServerInfo")
    try:
        call(b"", metadata=metadata, timeout=60)
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}  # more than gRPC takes


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(server):
    before = server.peak_rss()
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options, grpc.Compression.Gzip) as channel:
        call: Any = channel.unary_unary(f"{SERVICE}/ComputeLoss")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(256 << 20), timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.peak_rss() - before < 64 << 20
    server.assert_serves()


@pytest.mark.parametrize("prelude", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_bytes_that_are_no_http_at_all(server, kind, prelude):
    host, _, port = server.address.rpartition(":")
    path = server.unix_address.removeprefix("unix:")
    noise = random.Random(5)  # noqa: S311  # not for secrets
    for _ in range(50):
        with socket.socket(kind) as peer, suppress(OSError):  # the server may have had enough of it
            peer.connect(path if kind == socket.AF_UNIX else (host, int(port)))
            peer.sendall(prelude + noise.randbytes(noise.randrange(1, 5_000)))
    server.assert_serves()


def test_packets_that_are_no_messages_of_shared_memory(server):
    noise = random.Random(6)  # noqa: S311  # not for secrets
    packets = (b"LSHM\1\1\0\0" + bytes(24), b"LSHM", noise.randbytes(32), noise.randbytes(3_000))
    for packet in packets * 10:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer, suppress(OSError):
            peer.connect(f"{server.unix_address.removeprefix('unix:')}.shm")
            peer.sendall(packet)
    server.assert_serves()
