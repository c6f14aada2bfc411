"""A stream for asyncio: items go out in one task, answers come in in another."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from lossd_client._access import Metadata
from lossd_client._errors import LossdError, error_of_call
from lossd_client._requests import SMALL_BYTES
from lossd_client._storage import Storage
from lossd_client._streams import InOrder, Stream, require_size

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class StreamOfTasks(Generic[R]):
    """One stream; see `StreamOfThreads`."""

    def __init__(
        self,
        stream: Stream[R],
        items: Iterable[Any] | AsyncIterable[Any],
        message_limit: Callable[[], Awaitable[int]],
        pool: "Callable[[], Awaitable[Pool | None]]",
    ) -> None:
        self._stream = stream
        self._items = items if isinstance(items, AsyncIterable) else _each(items)
        self._message_limit = message_limit
        self._pool = pool
        self._places = asyncio.Semaphore(stream.window)
        self._outcomes: asyncio.Queue[tuple[int, R | LossdError] | None] = asyncio.Queue()
        self._count = 0
        self._failure: Exception | None = None

    async def results(
        self, channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata | None
    ) -> AsyncIterator[R | LossdError]:
        """Yields the results in the order of the items; ends the call however it is left."""
        call: Any = channel.stream_stream(self._stream.path)(timeout=timeout, metadata=metadata)
        tasks = [asyncio.create_task(self._send(call)), asyncio.create_task(self._receive(call))]
        order = InOrder(self._stream)
        try:
            while (outcome := await self._outcomes.get()) is not None:
                order.put(*outcome)
                for result in order.ready():
                    yield result
                    self._places.release()
            if self._failure is not None:
                raise self._failure
            order.require_all(self._count)
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._stream.close()

    async def _send(self, call: Any) -> None:
        """Sends the requests; what the items raise ends them, and is raised after the last result."""
        try:
            async for index, item in self._paced():
                self._count = index + 1
                try:
                    request = await self._request(index, item)
                except LossdError as error:
                    self._outcomes.put_nowait((index, error))
                else:
                    await call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError):  # the call has ended: the receiver hears why
            return
        except Exception as error:  # noqa: BLE001  # whatever the caller's code raises is the caller's
            self._failure = error
        await call.done_writing()

    async def _paced(self) -> AsyncIterator[tuple[int, Any]]:
        """Yields an item for each place in the window, and its index."""
        items, index = aiter(self._items), 0
        while await self._places.acquire():
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
            yield index, item
            index += 1

    async def _request(self, index: int, item: Any) -> bytes:
        pool = await self._pool()
        make = partial(self._stream.request, index, item, Storage(pool))
        request = make() if pool is None else await asyncio.to_thread(make)
        if request.size > SMALL_BYTES:
            require_size(index, request, await self._message_limit())
        return request.write()

    async def _receive(self, call: Any) -> None:
        try:
            async for data in call:
                self._outcomes.put_nowait(self._stream.outcome(data))
        except grpc.RpcError as error:
            self._failure = error_of_call(error)
        except Exception as error:  # noqa: BLE001  # an answer that cannot be read
            self._failure = error
        finally:
            self._outcomes.put_nowait(None)


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
