"""A stream for asyncio: items come in one task, go out in another, answers come in in a third."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from lossd.wire import Buffer
from lossd_client._calls import SMALL_BYTES
from lossd_client._errors import LossdError, error_of_call
from lossd_client._retries import Attempts
from lossd_client._storage import Storage
from lossd_client._streams import InOrder, OnTheirWay, Stream, require_size

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class StreamOfTasks(Generic[R]):
    """One stream, over as many calls as it takes; see `StreamOfThreads`."""

    def __init__(
        self,
        stream: Stream[R],
        items: Iterable[Any] | AsyncIterable[Any],
        attempts: Attempts,
        message_limit: Callable[[], Awaitable[int]],
        pool: "Callable[[], Awaitable[Pool | None]]",
    ) -> None:
        self._stream = stream
        self._items = items if isinstance(items, AsyncIterable) else _each(items)
        self._deadline = attempts.deadline
        self._message_limit = message_limit
        self._pool = pool
        self._way = OnTheirWay(stream, attempts)
        self._changed = asyncio.Event()
        self._places = asyncio.Semaphore(stream.window)
        self._outcomes: asyncio.Queue[tuple[int, R | LossdError] | None] = asyncio.Queue()
        self._error: Exception | None = None
        self._failure: Exception | None = None

    async def results(
        self, channel: grpc.aio.Channel, settings: Callable[[], Mapping[str, Any]]
    ) -> AsyncGenerator[R | LossdError, None]:
        """Yields the results in the order of the items; ends the call however it is left."""
        taking = asyncio.create_task(self._take_items())
        order = InOrder(self._stream)
        pause: float | None = 0.0
        try:
            while pause is not None:
                await asyncio.sleep(pause)
                async with aclosing(self._call(channel, settings)) as outcomes:
                    async for outcome in outcomes:
                        order.put(*outcome)
                        for result in order.ready():
                            yield result
                            self._places.release()
                pause = self._way.pause(self._error)
            if self._failure is not None:
                raise self._failure
        finally:
            await _ended(taking)
            self._way.close()

    async def _take_items(self) -> None:
        """Takes an item for each place in the window; what that raises is raised after the last result."""
        try:
            items = aiter(self._items)
            while await self._places.acquire():
                self._way.add(await anext(items))
                self._changed.set()
        except StopAsyncIteration:
            self._end()
        except Exception as error:  # noqa: BLE001  # whatever the caller's code raises is the caller's
            self._failure = error
            self._end()

    def _end(self, before: int | None = None) -> None:
        self._way.end(before)
        self._changed.set()

    async def _call(
        self, channel: grpc.aio.Channel, settings: Callable[[], Mapping[str, Any]]
    ) -> AsyncGenerator[tuple[int, R | LossdError], None]:
        """Makes one call, with all that has no answer yet; yields outcomes until it has ended."""
        number = self._way.begin()
        self._error = None
        method: Any = channel.stream_stream(self._stream.path)
        call = method(timeout=self._deadline.remaining(), **settings())
        tasks = [asyncio.create_task(self._send(call, number)), asyncio.create_task(self._receive(call))]
        try:
            while (outcome := await self._outcomes.get()) is not None:
                yield outcome
        finally:
            call.cancel()
            await _ended(*tasks)

    async def _send(self, call: Any, number: int) -> None:
        """Sends the requests of a call."""
        try:
            while (entry := await self._next(number)) is not None:
                request = await self._request(number, *entry)
                if request is not None:
                    await call.write(request)
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):  # the call has ended: the receiver hears why
            return

    async def _next(self, call: int) -> tuple[int, Any] | None:
        while not self._way.has_news(call):
            self._changed.clear()
            await self._changed.wait()
        return self._way.next(call)

    async def _request(self, call: int, index: int, item: Any) -> bytes | None:
        """Returns the request for an item; None where it is not to be sent, on this call or at all."""
        try:
            storage, pieces = await self._packed(index, item)
            size = sum(map(len, pieces))
            if size > SMALL_BYTES:
                require_size(index, size, await self._message_limit())
        except LossdError as error:
            if self._way.drop(call, index):
                self._outcomes.put_nowait((index, error))
            return None
        except Exception as error:  # noqa: BLE001  # the caller's item has not the form of the loss
            self._failure = error
            self._end(before=index)
            return None
        return b"".join(pieces) if self._way.will_send(call, index, storage) else None

    async def _packed(self, index: int, item: Any) -> tuple[Storage, list[Buffer]]:
        """Returns an item as a request, and what that was packed into."""
        pool = await self._pool()

        def pack() -> tuple[Storage, list[Buffer]]:
            storage = self._way.storage(index, pool)
            return storage, self._stream.request(index, item, storage)

        # Passing memory waits for the server, and tensors are copied: not on the loop's time.
        return pack() if pool is None else await asyncio.to_thread(pack)

    async def _receive(self, call: Any) -> None:
        try:
            async for data in call:
                outcome = self._way.outcome(data)
                if outcome is not None:
                    self._outcomes.put_nowait(outcome)
                else:
                    self._changed.set()
        except grpc.RpcError as error:
            self._error = error_of_call(error)
        except Exception as error:  # noqa: BLE001  # an answer that cannot be read
            self._error = error
        finally:
            self._outcomes.put_nowait(None)


async def _ended(*tasks: asyncio.Task[None]) -> None:
    """Returns when tasks, told to end, have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
