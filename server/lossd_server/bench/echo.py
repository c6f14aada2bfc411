"""Bare gRPC servers in a process of their own, which answer with what they were sent."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from subprocess import Popen
from typing import Any

import grpc

from lossd.channel_options import Options, client_options, server_options
from lossd_server.bench import process
from lossd_server.engine import keep_freed_memory

METHOD = "/lossd.bench.Echo/Echo"

_THREADS = 64
"""As many as a server of lossd has."""


class Kind(StrEnum):
    """How a server runs its handlers."""

    THREADS = "threads"
    """Each on a thread of a pool."""
    ASYNCIO = "asyncio"
    """All on one event loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoServer:
    """A server, and what is to be said to its callers.

    Attributes:
        kind: How it runs its handlers.
        options: Its gRPC options.
        client_options: Those of its callers' channels.
    """

    kind: Kind
    options: Options
    client_options: Options


def _lossd(kind: Kind) -> EchoServer:
    return EchoServer(kind=kind, options=server_options(2**31 - 1), client_options=client_options())


def _tried(*options: tuple[str, int | str]) -> EchoServer:
    """Returns a server with gRPC's defaults but for these, on both sides."""
    common: Options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
        *options,
    ]
    return EchoServer(kind=Kind.THREADS, options=common, client_options=common)


_MEBIBYTE = 1 << 20

SERVERS = {
    "default": _tried(),
    "retry buffer": _tried(("grpc.per_rpc_retry_buffer_size", 2048 * _MEBIBYTE - 1)),
    "frames": _tried(("grpc.http2.max_frame_size", 16 * _MEBIBYTE - 1)),
    "write buffer": _tried(("grpc.http2.write_buffer_size", 16 * _MEBIBYTE)),
    "read-ahead": _tried(("grpc.http2.lookahead_bytes", 16 * _MEBIBYTE)),
    "fixed window": _tried(("grpc.http2.lookahead_bytes", 16 * _MEBIBYTE), ("grpc.http2.bdp_probe", 0)),
    "throughput": _tried(("grpc.optimization_target", "throughput")),
    "lossd": _lossd(Kind.THREADS),
    "asyncio": _lossd(Kind.ASYNCIO),
}
"""Options one by one, of which lossd has the retry buffer alone; all that lossd has; and asyncio."""


class EchoProcess:
    """A process with all these servers.

    Attributes:
        addresses: Where they listen, by name.
    """

    def __init__(self) -> None:
        self._process: Popen[str]
        self._process, line = process.start(__name__)
        self.addresses: dict[str, str] = json.loads(line)

    def stop(self) -> None:
        """Ends the process."""
        process.stop(self._process)


def main() -> None:
    """Serves until standard input ends."""
    keep_freed_memory()
    asyncio.run(_serve())


async def _serve() -> None:
    addresses = {}
    async with AsyncExitStack() as running:
        for name, server in SERVERS.items():
            start = _start_threads if server.kind == Kind.THREADS else _start_asyncio
            addresses[name] = f"127.0.0.1:{await start(server.options, running)}"
        await asyncio.to_thread(process.listening, json.dumps(addresses))


async def _start_threads(options: Options, running: AsyncExitStack) -> int:
    server = grpc.server(ThreadPoolExecutor(_THREADS), options=options)
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda data, _call: data)
    server.add_generic_rpc_handlers((_handlers(handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    running.callback(lambda: server.stop(0).wait())
    return port


async def _start_asyncio(options: Options, running: AsyncExitStack) -> int:
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_handlers(grpc.unary_unary_rpc_method_handler(_echo)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running.push_async_callback(server.stop, 0)
    return port


async def _echo(data: bytes, _call: object) -> bytes:
    return data


def _handlers(handler: Any) -> grpc.GenericRpcHandler:
    service, name = METHOD.strip("/").split("/")
    return grpc.method_handlers_generic_handler(service, {name: handler})
