"""The cases of gRPC itself: an echo under one choice of option, connections or server, and another."""

import os
from collections.abc import Sequence
from functools import partial

import grpc

from lossd.channel_options import Options, client_options, server_options
from lossd_server.bench.case import Case, CaseSpec, Path, Workbench
from lossd_server.bench.echo import METHOD, EchoProcess, EchoServer, Kind

_SIZES = {"1kB": 1_024, "S": 54_080, "M": 6_400_000, "L": 51_200_000}
_CALLERS = 64
_CHANNELS = (1, 2, 4)
_AT_A_TIME = {"M": 16, "L": 4}
_SMALL_CALLS = 20

_MEBIBYTE = 1 << 20
_BESIDE_ALL: Options = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]

_TRIED: dict[str, Options] = {
    "retry buffer": [("grpc.per_rpc_retry_buffer_size", 2048 * _MEBIBYTE - 1)],
    "frames": [("grpc.http2.max_frame_size", 16 * _MEBIBYTE - 1)],
    "write buffer": [("grpc.http2.write_buffer_size", 16 * _MEBIBYTE)],
    "read-ahead": [("grpc.http2.lookahead_bytes", 16 * _MEBIBYTE)],
    "fixed window": [("grpc.http2.lookahead_bytes", 16 * _MEBIBYTE), ("grpc.http2.bdp_probe", 0)],
    "throughput": [("grpc.optimization_target", "throughput")],
}
"""Options one by one, each on both sides. Of these the table has the retry buffer alone."""


def option_cases() -> list[CaseSpec]:
    """Returns the cases of gRPC's options, connections and servers."""
    return [
        *(
            CaseSpec(
                name=f"options-{size}",
                title=f"bare echo of {_SIZES[size]:,} bytes under gRPC options",
                build=partial(_options, size=size),
                large=size == "L",
            )
            for size in _AT_A_TIME
        ),
        *(
            CaseSpec(
                name=f"channels-{size}",
                title=f"bare echoes of {_SIZES[size]:,} bytes, {count} at a time, over some connections",
                build=partial(_channels, size=size, count=count),
                large=True,
            )
            for size, count in _AT_A_TIME.items()
        ),
        CaseSpec(
            name="channels-beside",
            title=f"{_SMALL_CALLS} echoes of 1 kB, one by one, beside one of {_SIZES['L']:,} bytes",
            build=_beside,
            large=True,
        ),
        *(
            CaseSpec(
                name=f"servers-{size}",
                title=f"bare echo of {length:,} bytes by a server of threads, and by one of asyncio",
                build=partial(_servers, size=size, callers=1),
                large=size == "L",
            )
            for size, length in _SIZES.items()
        ),
        CaseSpec(
            name="servers-callers",
            title=f"the same of 1 kB, {_CALLERS} at a time",
            build=partial(_servers, size="1kB", callers=_CALLERS),
        ),
    ]


def _options(bench: Workbench, *, size: str) -> Case:
    tried = {name: [*_BESIDE_ALL, *options] for name, options in {"default": [], **_TRIED}.items()}
    sides = {name: (options, options) for name, options in tried.items()}
    sides["lossd"] = client_options(), server_options(2**31 - 1)
    servers = {name: EchoServer(kind=Kind.THREADS, options=server) for name, (_, server) in sides.items()}
    addresses = _start(bench, servers)
    paths = []
    for name, (client, _) in sides.items():
        send = _method(bench, addresses[name], client)
        paths.append(Path(name=name, call=partial(_call, [send], os.urandom(_SIZES[size]), 1)))
    return Case(paths=tuple(paths), base="default")


def _channels(bench: Workbench, *, size: str, count: int) -> Case:
    address, payload = _lossd_echo(bench), os.urandom(_SIZES[size])
    paths = [
        Path(
            name=f"{channels} connection{'s' if channels > 1 else ''}",
            call=partial(_call, [_method(bench, address) for _ in range(channels)], payload, count),
        )
        for channels in _CHANNELS
    ]
    return Case(paths=tuple(paths), base=paths[0].name)


def _beside(bench: Workbench) -> Case:
    address, large, small = _lossd_echo(bench), os.urandom(_SIZES["L"]), os.urandom(_SIZES["1kB"])
    send, other = (_method(bench, address) for _ in range(2))

    def calls(method: "grpc.UnaryUnaryMultiCallable[bytes, bytes]") -> None:
        busy = send.future(large)
        for _ in range(_SMALL_CALLS):
            method(small)
        busy.cancel()

    return Case(
        paths=(
            Path(name="same connection", call=partial(calls, send)),
            Path(name="another", call=partial(calls, other)),
        ),
        base="same connection",
    )


def _servers(bench: Workbench, *, size: str, callers: int) -> Case:
    servers = {kind.value: EchoServer(kind=kind, options=server_options(2**31 - 1)) for kind in Kind}
    addresses = _start(bench, servers)
    payload = os.urandom(_SIZES[size])
    paths = [
        Path(name=name, call=partial(_call, [_method(bench, address)], payload, callers))
        for name, address in addresses.items()
    ]
    return Case(paths=tuple(paths), base=Kind.THREADS)


def _lossd_echo(bench: Workbench) -> str:
    server = EchoServer(kind=Kind.THREADS, options=server_options(2**31 - 1))
    return _start(bench, {"lossd": server})["lossd"]


def _start(bench: Workbench, servers: dict[str, EchoServer]) -> dict[str, str]:
    started = EchoProcess(servers)
    bench.resources.callback(started.stop)
    return started.addresses


def _method(
    bench: Workbench, address: str, options: Options | None = None
) -> "grpc.UnaryUnaryMultiCallable[bytes, bytes]":
    """Returns the echo over a connection of its own."""
    chosen = client_options() if options is None else options
    channel = grpc.insecure_channel(address, options=chosen)
    bench.resources.callback(channel.close)
    return channel.unary_unary(METHOD)


def _call(
    methods: "Sequence[grpc.UnaryUnaryMultiCallable[bytes, bytes]]", payload: bytes, count: int
) -> None:
    """Makes some calls at a time, over the connections in turn."""
    if count == 1:
        methods[0](payload)
        return
    for call in [methods[index % len(methods)].future(payload) for index in range(count)]:
        call.result()
