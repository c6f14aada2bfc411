"""One request sent as several calls, a while apart: the first good answer counts.

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

_MOST_CALLS = 3
"""Two are not enough for two servers: both may go to the one whose connection is made first."""

_UnaryCall: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
_AsyncUnaryCall: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"


def send(method: _UnaryCall, data: bytes, after: float | None, deadline: Deadline, **settings: Any) -> bytes:
    """Returns the answer to a request, which is sent again, twice at most, where none comes for some seconds.

    Args:
        method: The method.
        data: The request.
        after: The seconds, and then again; None sends it once.
        deadline: When it is to be over.
        **settings: Those of a call.

    Raises:
        grpc.RpcError: It failed, or all did.
    """
    if after is None:
        return method(data, timeout=deadline.remaining(), **settings)
    done: SimpleQueue[Any] = SimpleQueue()
    calls: list[Any] = []

    def begin() -> None:
        calls.append(method.future(data, timeout=deadline.remaining(), **settings))
        calls[-1].add_done_callback(done.put)

    begin()
    waiting = 1
    try:
        while True:
            try:
                first = done.get(timeout=after if len(calls) < _MOST_CALLS else None)
            except Empty:
                begin()
                waiting += 1
                continue
            waiting -= 1
            if not waiting or not _is_unanswered(first.exception()):
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
    tasks = [asyncio.create_task(ask())]
    pending = set(tasks)
    try:
        while True:
            done, pending = await asyncio.wait(
                pending,
                timeout=after if len(tasks) < _MOST_CALLS else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                tasks.append(asyncio.create_task(ask()))
                pending.add(tasks[-1])
            elif not pending or _answered(done):
                return (_answered(done) or list(done))[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _answered(done: Collection[asyncio.Task[bytes]]) -> list[asyncio.Task[bytes]]:
    return [task for task in done if not _is_unanswered(task.exception())]


def _is_unanswered(error: Any) -> bool:
    """Returns whether another call may fare better."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
