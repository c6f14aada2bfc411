"""A stream for ordinary code: items come on one thread, go out on another, answers come in on a third."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from lossd_client._calls import SMALL_BYTES
from lossd_client._errors import LossdError, error_of_call
from lossd_client._retries import Attempts
from lossd_client._streams import InOrder, OnTheirWay, Stream, require_size

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")


class StreamOfThreads(Generic[R]):
    """One stream, over as many calls as it takes.

    Args:
        stream: What it carries.
        items: Taken one by one, on a thread of their own, as there is room.
        attempts: Those at getting answers; their deadline is that of the whole stream.
        message_limit: Says how much the server reads in one message.
        pool: Gives the memory that is shared with the server, if any is.
    """

    def __init__(
        self,
        stream: Stream[R],
        items: Iterable[Any],
        attempts: Attempts,
        message_limit: Callable[[], int],
        pool: "Callable[[], Pool | None]",
    ) -> None:
        self._stream = stream
        self._items = items
        self._deadline = attempts.deadline
        self._message_limit = message_limit
        self._pool = pool
        self._way = OnTheirWay(stream, attempts)
        self._changed = threading.Condition()  # also the lock of what is on its way
        self._places = threading.Semaphore(stream.window)
        self._outcomes: SimpleQueue[tuple[int, R | LossdError] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._failure: Exception | None = None
        self._closed = False

    def results(
        self, channel: grpc.Channel, settings: Callable[[], Mapping[str, Any]]
    ) -> Iterator[R | LossdError]:
        """Yields the results in the order of the items; ends the call however it is left.

        Args:
            channel: Where to call.
            settings: Gives those of a call.
        """
        threading.Thread(target=self._take_items, name="lossd-items", daemon=True).start()
        order = InOrder(self._stream)
        pause: float | None = 0.0
        try:
            while pause is not None:
                time.sleep(pause)
                with closing(self._call(channel, settings)) as outcomes:
                    for outcome in outcomes:
                        order.put(*outcome)
                        for result in order.ready():
                            yield result
                            self._places.release()
                pause = self._way.pause(self._error)
            if self._failure is not None:
                raise self._failure
        finally:
            self._closed = True
            self._places.release()
            with self._changed:
                self._way.close()
                self._changed.notify_all()

    def _take_items(self) -> None:
        """Takes an item for each place in the window; what that raises is raised after the last result."""
        try:
            items = iter(self._items)
            while self._places.acquire() and not self._closed:
                item = next(items)
                with self._changed:
                    self._way.add(item)
                    self._changed.notify_all()
        except StopIteration:
            self._end()
        except Exception as error:  # noqa: BLE001  # whatever the caller's code raises is the caller's
            self._failure = error
            self._end()

    def _end(self, before: int | None = None) -> None:
        with self._changed:
            self._way.end(before)
            self._changed.notify_all()

    def _call(
        self, channel: grpc.Channel, settings: Callable[[], Mapping[str, Any]]
    ) -> Generator[tuple[int, R | LossdError], None, None]:
        """Makes one call, with all that has no answer yet; yields outcomes until it has ended."""
        with self._changed:
            number = self._way.begin()
            self._changed.notify_all()
        self._error = None
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(self._stream.path)
        call = method(self._requests(number), timeout=self._deadline.remaining(), **settings())
        receiver = threading.Thread(target=self._receive, args=(call,), name="lossd-answers", daemon=True)
        receiver.start()
        try:
            while (outcome := self._outcomes.get()) is not None:
                yield outcome
        finally:
            call.cancel()
            receiver.join()

    def _requests(self, call: int) -> Iterator[bytes]:
        """Yields the requests of a call."""
        while (entry := self._next(call)) is not None:
            request = self._request(call, *entry)
            if request is not None:
                yield request

    def _next(self, call: int) -> tuple[int, Any] | None:
        with self._changed:
            self._changed.wait_for(partial(self._way.has_news, call))
            return self._way.next(call)

    def _request(self, call: int, index: int, item: Any) -> bytes | None:
        """Returns the request for an item; None where it is not to be sent, on this call or at all."""
        try:
            storage = self._way.storage(index, self._pool())
            pieces = self._stream.request(index, item, storage)
            size = sum(map(len, pieces))
            if size > SMALL_BYTES:
                require_size(index, size, self._message_limit())
        except LossdError as error:
            with self._changed:
                is_refused = self._way.drop(call, index)
            if is_refused:
                self._outcomes.put((index, error))
            return None
        except Exception as error:  # noqa: BLE001  # the caller's item has not the form of the loss
            self._failure = error
            self._end(before=index)
            return None
        with self._changed:
            will_send = self._way.will_send(call, index, storage)
        return b"".join(pieces) if will_send else None

    def _receive(self, call: Any) -> None:
        try:
            for data in call:
                outcome = self._way.outcome(data)
                if outcome is not None:
                    self._outcomes.put(outcome)
                else:
                    with self._changed:
                        self._changed.notify_all()
        except grpc.RpcError as error:
            self._error = error_of_call(error)
        except Exception as error:  # noqa: BLE001  # an answer that cannot be read
            self._error = error
        finally:
            self._outcomes.put(None)
