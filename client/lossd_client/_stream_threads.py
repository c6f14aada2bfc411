"""A stream for ordinary code: items go out on one thread, answers come in on another."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
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


class StreamOfThreads(Generic[R]):
    """One stream.

    Args:
        stream: What it carries.
        items: Taken one by one, on a thread of gRPC's, as there is room.
        message_limit: Says how much the server reads in one message.
        pool: Gives the memory that is shared with the server, if any is.
    """

    def __init__(
        self,
        stream: Stream[R],
        items: Iterable[Any],
        message_limit: Callable[[], int],
        pool: "Callable[[], Pool | None]",
    ) -> None:
        self._stream = stream
        self._items = items
        self._message_limit = message_limit
        self._pool = pool
        self._places = threading.Semaphore(stream.window)
        self._outcomes: SimpleQueue[tuple[int, R | LossdError] | None] = SimpleQueue()
        self._count = 0
        self._failure: Exception | None = None
        self._closed = False

    def results(
        self, channel: grpc.Channel, timeout: float | None, metadata: Metadata | None
    ) -> Iterator[R | LossdError]:
        """Yields the results in the order of the items; ends the call however it is left."""
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(self._stream.path)
        call = method(self._requests(), timeout=timeout, metadata=metadata)
        receiver = threading.Thread(target=self._receive, args=(call,), name="lossd-answers", daemon=True)
        receiver.start()
        order = InOrder(self._stream)
        try:
            while (outcome := self._outcomes.get()) is not None:
                order.put(*outcome)
                for result in order.ready():
                    yield result
                    self._places.release()
            if self._failure is not None:
                raise self._failure
            order.require_all(self._count)
        finally:
            self._closed = True
            self._places.release()
            call.cancel()
            receiver.join()
            self._stream.close()

    def _requests(self) -> Iterator[bytes]:
        """Yields the requests; what the items raise ends them, and is raised after the last result."""
        try:
            for index, item in enumerate(self._paced()):
                self._count = index + 1
                try:
                    yield self._request(index, item)
                except LossdError as error:
                    self._outcomes.put((index, error))
        except Exception as error:  # noqa: BLE001  # whatever the caller's code raises is the caller's
            self._failure = error

    def _paced(self) -> Iterator[Any]:
        """Yields an item for each place in the window."""
        items = iter(self._items)
        while self._places.acquire() and not self._closed:
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    def _request(self, index: int, item: Any) -> bytes:
        request = self._stream.request(index, item, Storage(self._pool()))
        if request.size > SMALL_BYTES:
            require_size(index, request, self._message_limit())
        return request.write()

    def _receive(self, call: Any) -> None:
        try:
            for data in call:
                self._outcomes.put(self._stream.outcome(data))
        except grpc.RpcError as error:
            self._failure = error_of_call(error)
        except Exception as error:  # noqa: BLE001  # an answer that cannot be read
            self._failure = error
        finally:
            self._outcomes.put(None)
