"""A lane for asyncio."""

import asyncio
import time
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from lossd_client import _lanes
from lossd_client._calls import Call
from lossd_client._retries import Deadline

R = TypeVar("R")

_END_SECONDS = 0.2
"""How long the end of a loop waits for a lane to end."""

_ENDED = (grpc.RpcError, asyncio.InvalidStateError)
"""What gRPC raises where a call has ended."""


class LaneOfTasks(_lanes.Lane):
    """A lane on which a task waits for its answer."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        super().__init__(channel, method)
        stream: Any = channel.stream_stream(self.path)
        self._call = stream(**_lanes.SETTINGS)
        self._idle_since = time.monotonic()
        self._is_busy = False
        self._closed = asyncio.Event()
        self._end = asyncio.create_task(self._end_in_time())

    async def ask(self, call: Call[R], request: bytes, deadline: Deadline) -> R | None:
        """Returns the result of a call; None where it is to be made by itself.

        Raises:
            LossdError: The request was refused, or the deadline has passed.
        """
        data = await self._exchange(self.message(request), self.patience(deadline))
        return self.result(call, data, deadline)

    def close(self) -> None:
        """Ends it, once what was sent is answered."""
        self.is_open = False
        self._closed.set()

    async def _exchange(self, message: bytes, patience: float | None) -> bytes | None:
        """Returns what comes for a message; None where nothing does."""
        data = None
        self.is_sent = self._is_busy = self.is_open
        try:
            if self.is_sent:
                async with asyncio.timeout(patience):
                    await self._call.write(message)
                    answer = await self._call.read()
                data = None if answer is grpc.aio.EOF else answer
                self.has_failed = data is None
        except (*_ENDED, TimeoutError):
            self.has_failed = True
        finally:
            self._is_busy, self._idle_since = False, time.monotonic()
            if data is None:  # also where the task was cancelled: an answer would be taken for the next
                self.close()
                self._call.cancel()
        return data

    async def _end_in_time(self) -> None:
        """Ends it when it was closed, or nobody has used it for some time, or with its loop."""
        try:
            while self.is_open:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_lanes.IDLE_SECONDS / 4):
                        await self._closed.wait()
                if not self._is_busy and time.monotonic() - self._idle_since > _lanes.IDLE_SECONDS:
                    self.is_open = False
        except asyncio.CancelledError:
            self.is_open = False
            await self._finish()
            raise
        await self._finish()

    async def _finish(self) -> None:
        """Ends the call, and waits until it has: what comes when the loop is closed fails there."""
        with suppress(*_ENDED, TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._call.done_writing()
                await self._call.read()
        self._call.cancel()
