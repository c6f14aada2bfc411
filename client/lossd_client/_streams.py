"""What both clients know of a stream: its requests, its answers, and the order of its results."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc

from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Parcel
from lossd_client._calls import method_path, read_answer, read_result
from lossd_client._errors import LossdError, ServerError, at_item, error_of_answer, too_large
from lossd_client._storage import Storage

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream(Generic[R]):
    """The stream twin of a method, which takes one item a request.

    Attributes:
        method: Name of the method without its twin's suffix.
        make: Returns the request for an item, as if it were the only one, packed into a storage.
        read: Makes the result of an item's answer, which may lie in that storage.
        window: Most items that are on their way: sent, and not yet taken as results.
        return_exceptions: Whether a refused item's error is its result, instead of being raised.
        storages: Those of the items that are on their way, by index.
    """

    method: str
    make: Callable[[Any, Storage], Parcel[Any]]
    read: Callable[[Parcel[Any], Storage], R]
    window: int
    return_exceptions: bool
    storages: dict[int, Storage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a window without room with `ValueError`."""
        if self.window < 1:
            raise ValueError(f"window is {self.window}, want at least 1")

    @property
    def path(self) -> str:
        """What gRPC calls the method."""
        return method_path(f"{self.method}Stream")

    def request(self, index: int, item: Any, storage: Storage) -> Parcel[Any]:
        """Returns the request for an item; raises `LossdError` for one that cannot be sent."""
        try:
            request = self.make(item, storage)
        except LossdError as error:
            raise at_item(error, index) from None
        self.storages[index] = storage
        envelope = getattr(pb, f"{self.method}StreamRequest")
        return Parcel(envelope(id=index, request=request.message), request.payloads)

    def outcome(self, data: bytes) -> tuple[int, R | LossdError]:
        """Returns which item an answer is for, and its result or why it was refused."""
        answer = read_answer(f"{self.method}Stream", data)
        message = answer.message
        storage = self.storages.pop(message.id, Storage(None))
        if message.WhichOneof("outcome") == "error":
            return message.id, at_item(error_of_answer(message.error), message.id)
        response = Parcel(message.response, answer.payloads)
        return message.id, read_result(self.method, self.read, response, storage)

    def close(self) -> None:
        """Gives up what was not answered."""
        for storage in list(self.storages.values()):
            storage.abandon()
        self.storages.clear()


def require_size(index: int, request: Parcel[Any], max_bytes: int) -> None:
    """Raises `TooLargeError` for a request that the server does not read: it would end the stream."""
    if request.size > max_bytes:
        raise too_large(f"items[{index}]", request.size, max_bytes)


class InOrder(Generic[R]):
    """Outcomes in the order of their items, whatever order they come in."""

    def __init__(self, stream: Stream[R]) -> None:
        self._stream = stream
        self._early: dict[int, R | LossdError] = {}
        self._next = 0

    def put(self, index: int, outcome: R | LossdError) -> None:
        """Keeps the outcome of an item until its turn."""
        self._early[index] = outcome

    def ready(self) -> Iterator[R | LossdError]:
        """Yields the outcomes whose turn has come; raises the error of a refused item in its turn."""
        while self._next in self._early:
            outcome = self._early.pop(self._next)
            self._next += 1
            if isinstance(outcome, LossdError) and not self._stream.return_exceptions:
                raise outcome
            yield outcome

    def require_all(self, count: int) -> None:
        """Raises `ServerError` unless all of so many items had their turn."""
        if self._next < count:
            message = f"the server ended the stream after {self._next} of {count} answers"
            raise ServerError(grpc.StatusCode.INTERNAL, message)
