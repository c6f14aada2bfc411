"""A lane for asyncio."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from lossd_client import _lanes
from lossd_client._calls import Call
from lossd_client._retries import Deadline

R = TypeVar("R")

_ENDED = (grpc.RpcError, asyncio.InvalidStateError)
"""What gRPC raises where a call has ended."""


class LaneOfTasks(_lanes.Lane):
    """A lane on which a task waits for its answer."""

    def __init__(
        self, channel: grpc.aio.Channel, method: str, deadline: Deadline, give_back: Callable[[], None]
    ) -> None:
        super().__init__(channel, method, deadline, give_back)
        stream: Any = channel.stream_stream(self.path)
        self._call = stream(**self.settings)
        self._loop = asyncio.get_running_loop()
        self._idle = self._loop.call_later(_lanes.IDLE_SECONDS, self.close)
        self._ending: asyncio.Task[None] | None = None

    async def ask(self, call: Call[R], request: bytes) -> R | None:
        """Returns the result of a call; None where the lane has ended without an answer.

        Raises:
            LossdError: The request was refused.
        """
        self._idle.cancel()
        try:
            data = await self._exchange(self.next_message(request))
            return None if data is None else self.result(call, data)
        finally:
            if self.is_open:
                self._idle = self._loop.call_later(_lanes.IDLE_SECONDS, self.close)
            self.give_back()

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        if self.is_open:
            self.is_open = False
            self._idle.cancel()
            self._ending = self._loop.create_task(self._finish())

    async def _exchange(self, message: bytes) -> bytes | None:
        """Returns what comes for a message; None where the lane has ended."""
        data = None
        try:
            await self._call.write(message)
            answer = await self._call.read()
            data = None if answer is grpc.aio.EOF else answer
        except _ENDED:
            self.has_failed = True
        finally:
            if data is None:  # also where the task was cancelled: the answer would be taken for the next
                self.close()
                self._call.cancel()
        return data

    async def _finish(self) -> None:
        with suppress(*_ENDED, asyncio.CancelledError):
            await self._call.done_writing()
            await self._call.read()
