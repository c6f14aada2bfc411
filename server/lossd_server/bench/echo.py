"""Bare gRPC servers in a process of their own, which answer with what they were sent."""

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from subprocess import Popen
from typing import Any

import grpc

from lossd.channel_options import Options
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
    """A server to start.

    Attributes:
        kind: How it runs its handlers.
        options: Its gRPC options.
    """

    kind: Kind
    options: Options


class EchoProcess:
    """A process with some servers.

    Attributes:
        addresses: Where they listen, by the names they were given.
    """

    def __init__(self, servers: Mapping[str, EchoServer]) -> None:
        argument = json.dumps({name: [server.kind, server.options] for name, server in servers.items()})
        self._process: Popen[str]
        self._process, line = process.start(__name__, argument)
        self.addresses: dict[str, str] = json.loads(line)

    def stop(self) -> None:
        """Ends the process."""
        process.stop(self._process)


def main(argument: str) -> None:
    """Serves until standard input ends."""
    keep_freed_memory()
    asyncio.run(_serve(json.loads(argument)))


async def _serve(servers: Mapping[str, Any]) -> None:
    ports = {}
    async with AsyncExitStack() as running:
        for name, (kind, options) in servers.items():
            start = _start_threads if kind == Kind.THREADS else _start_asyncio
            ports[name] = await start([(key, value) for key, value in options], running)
        addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
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
