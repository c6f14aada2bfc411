"""The gRPC options of both sides: one table, each with its reason.

What pays nothing is not in it. An echo of 6.4 or 51 MB under larger frames, write buffer or read-ahead, a
fixed window or `optimization_target` is 0.87 to 1.10 times as fast as under the defaults, and not the same
in two runs. So it is with more connections: 16 calls of 6.4 MB at a time, or four of 51, are 0.8 to 1.4
times as fast over two or four as over one. `lossd bench options channels` prints it.
"""

import json
from collections.abc import Iterator
from enum import Flag, auto
from typing import TypeAlias

Options: TypeAlias = list[tuple[str, int | str]]

_MEBIBYTE = 1 << 20

_MOST_CALLS = 2**31 - 1

_LEAST_CALLS = 16
"""A connection has streams and watchers open as well."""

_SERVICE_CONFIG: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}


class _Side(Flag):
    CLIENT = auto()
    SERVER = auto()
    BOTH = CLIENT | SERVER


def client_options() -> Options:
    """Returns the options of a client's channel."""
    return [(name, value) for side, name, value in _table(-1) if _Side.CLIENT in side]


def server_options(
    max_message_bytes: int, *, max_connection_age_seconds: float = 0, max_calls: int = _MOST_CALLS
) -> Options:
    """Returns the options of a server.

    Args:
        max_message_bytes: Largest request that it reads.
        max_connection_age_seconds: How long a connection takes new calls; 0 for ever.
        max_calls: Calls of one connection at a time; the others wait at their client.
    """
    table = _table(max_message_bytes, max(max_calls, _LEAST_CALLS))
    options = [(name, value) for side, name, value in table if _Side.SERVER in side]
    if max_connection_age_seconds:
        # With no end to the calls that run, as is gRPC's default: a stream is not cut.
        options.append(("grpc.max_connection_age_ms", round(max_connection_age_seconds * 1000)))
    return options


def _table(max_message_bytes: int, max_calls: int = _MOST_CALLS) -> Iterator[tuple[_Side, str, int | str]]:
    # What a client asked for it reads; what a server reads is the operator's to say. gRPC's own limit
    # is 4 MiB, less than the logits of one image.
    yield _Side.CLIENT, "grpc.max_receive_message_length", -1
    yield _Side.SERVER, "grpc.max_receive_message_length", max_message_bytes
    # The other side judges what it is sent.
    yield _Side.BOTH, "grpc.max_send_message_length", -1
    # Calls go round all addresses of a name, past those that do not answer. What was not answered the
    # client asks again itself: gRPC's own retries hear no `RetryInfo`, and what they may not hold twice, such
    # as memory that an answer is written to, they do not know.
    yield _Side.CLIENT, "grpc.service_config", json.dumps(_SERVICE_CONFIG)
    # Every client has a connection of its own. gRPC would have all of a process share one, where small
    # calls of one client wait for large ones of another: 20 calls beside one of 51 MB took 72 to 95 ms
    # on the same connection, 31 to 68 on another (`lossd bench channels-beside`).
    yield _Side.CLIENT, "grpc.use_local_subchannel_pool", 1
    # A server that comes back is noticed within 1.2 s, less than a call's attempts take in all, not after the
    # two minutes of the default.
    yield _Side.CLIENT, "grpc.initial_reconnect_backoff_ms", 100
    yield _Side.CLIENT, "grpc.max_reconnect_backoff_ms", 1_000
    # Which is no backoff, but how long an attempt to connect may take: one lost packet costs a second. The
    # default is 20, in which a server may have come back.
    yield _Side.CLIENT, "grpc.min_reconnect_backoff_ms", 3_000
    # A peer that is gone without a word is noticed while a call is open: by a client after 60 s, by a
    # server after 80, which frees the thread of a stream; without, neither had noticed after 150.
    yield _Side.BOTH, "grpc.keepalive_time_ms", 20_000
    yield _Side.BOTH, "grpc.keepalive_timeout_ms", 20_000
    # A client's pings would be taken for an attack: the default is one in five minutes.
    yield _Side.SERVER, "grpc.http2.min_ping_interval_without_data_ms", 10_000
    yield _Side.SERVER, "grpc.keepalive_permit_without_calls", 1
    # Nobody gets half of a server's places by one connection: what it asks beyond that waits at the client
    # for its own earlier calls, and is not refused. Half-open calls of one connection end there too.
    yield _Side.SERVER, "grpc.max_concurrent_streams", max_calls
    # Or else calls that have ended, but are not cleared away, count against that: of 1,000 calls at a time
    # by a client that keeps to it, half were reset.
    yield _Side.SERVER, "grpc.http.overload_protection", 0
    # A body that is refused is not sent either, but for its first 64 KiB: a window for all of it is opened
    # when it is read. With the windows of the default, which grow to megabytes for each call, a server with
    # 16 places held 2.7 GB for 200 callers of 6.4 MB and answered 32 calls a second; so it holds 0.7 and
    # answers 66. A single call of that size takes a tenth longer.
    yield _Side.SERVER, "grpc.http2.bdp_probe", 0
    # Who connects and then says nothing is gone in this time, and its descriptor free: without, it was 120 s
    # by TLS and 60 as plain text. A client needs milliseconds, or the seconds that a bad network takes.
    yield _Side.SERVER, "grpc.server_handshake_timeout_ms", 10_000
    # A port that another server has is an error, not half of the calls each.
    yield _Side.SERVER, "grpc.so_reuseport", 0
