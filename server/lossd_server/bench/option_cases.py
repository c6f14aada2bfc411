"""The cases of gRPC itself: an echo under one choice of option, connections or server, and another."""

import os
from collections.abc import Sequence
from functools import partial

import grpc

from lossd_server.bench.case import Case, CaseSpec, Path, Workbench
from lossd_server.bench.echo import METHOD, SERVERS, Kind

_SIZES = {"1kB": 1_024, "S": 54_080, "M": 6_400_000, "L": 51_200_000}
_CALLERS = 64
_CHANNELS = (1, 2, 4)
_AT_A_TIME = {"M": 16, "L": 4}
_SMALL_CALLS = 20


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
            title=f"bare echoes of 1 kB, {_CALLERS} at a time, by a server of threads, and by one of asyncio",
            build=partial(_servers, size="1kB", callers=_CALLERS),
        ),
    ]


def _options(bench: Workbench, *, size: str) -> Case:
    payload = os.urandom(_SIZES[size])
    paths = [
        Path(name=name, call=partial(_call, [_method(bench, name)], payload, 1))
        for name, server in SERVERS.items()
        if server.kind == Kind.THREADS
    ]
    return Case(paths=tuple(paths), base="default")


def _channels(bench: Workbench, *, size: str, count: int) -> Case:
    payload = os.urandom(_SIZES[size])
    paths = [
        Path(
            name=f"{channels} connection{'s' if channels > 1 else ''}",
            call=partial(_call, [_method(bench) for _ in range(channels)], payload, count),
        )
        for channels in _CHANNELS
    ]
    return Case(paths=tuple(paths), base=paths[0].name)


def _beside(bench: Workbench) -> Case:
    large, small = os.urandom(_SIZES["L"]), os.urandom(_SIZES["1kB"])
    send, other = _method(bench), _method(bench)

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
    payload = os.urandom(_SIZES[size])
    return Case(
        paths=(
            Path(name="threads", call=partial(_call, [_method(bench)], payload, callers)),
            Path(name="asyncio", call=partial(_call, [_method(bench, "asyncio")], payload, callers)),
        ),
        base="threads",
    )


def _method(bench: Workbench, server: str = "lossd") -> "grpc.UnaryUnaryMultiCallable[bytes, bytes]":
    """Returns the echo of a server, over a connection of its own."""
    channel = grpc.insecure_channel(bench.echoes().addresses[server], options=SERVERS[server].client_options)
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
