"""One request sent as two calls, a while apart: the first good answer counts.

gRPC's core, which Python's is made of, does not know a `hedgingPolicy`.
"""

import asyncio
from collections.abc import Collection
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import grpc

from lossd_client._retries import Deadline

LARGEST_BYTES = 256 << 10
"""Requests from here on are not worth a second one: sending and evaluating them is what takes the time."""

_UnaryCall: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
_AsyncUnaryCall: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


def send(method: _UnaryCall, data: bytes, after: float | None, deadline: Deadline, **settings: Any) -> bytes:
    """Returns the answer to a request, which is sent again where none has come after some seconds.

    Args:
        method: The method.
        data: The request.
        after: The seconds; None sends it once.
        deadline: When it is to be over.
        **settings: Those of a call.

    Raises:
        grpc.RpcError: It failed, or both did.
    """
    if after is None:
        return method(data, timeout=deadline.remaining(), **settings)
    done: SimpleQueue[Any] = SimpleQueue()
    calls: list[Any] = []

    def begin() -> None:
        calls.append(method.future(data, timeout=deadline.remaining(), **settings))
        calls[-1].add_done_callback(done.put)

    begin()
    try:
        try:
            first = done.get(timeout=after)
        except Empty:
            begin()
            first = done.get()
            if _is_unanswered(first.exception()):
                first = done.get()
        answer: bytes = first.result()
        return answer
    finally:
        for call in calls:
            call.cancel()


async def send_async(
    method: _AsyncUnaryCall, data: bytes, after: float | None, deadline: Deadline, **settings: Any
) -> bytes:
    """Returns the answer to a request, as `send` does."""

    async def ask() -> bytes:
        return await method(data, timeout=deadline.remaining(), **settings)

    if after is None:
        return await ask()
    tasks: set[asyncio.Task[bytes]] = set()
    tasks.add(asyncio.create_task(ask()))
    try:
        done, _ = await asyncio.wait(tasks, timeout=after)
        if not done:
            tasks.add(asyncio.create_task(ask()))
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if pending and not _answered(done):
                done, _ = await asyncio.wait(pending)
        return (_answered(done) or list(done))[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _answered(done: Collection[asyncio.Task[bytes]]) -> list[asyncio.Task[bytes]]:
    return [task for task in done if not _is_unanswered(task.exception())]


def _is_unanswered(error: Any) -> bool:
    """Returns whether the other call may fare better."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
