"""What both clients know of a stream: its requests, its answers, and the order of its results."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from lossd.envelopes import envelope
from lossd.wire import Buffer, Parcel
from lossd.writing import Piece, placed
from lossd_client._calls import method_path, read_answer, read_result
from lossd_client._errors import (
    LossdError,
    ServerError,
    UnavailableError,
    at_item,
    error_of_answer,
    too_large,
)
from lossd_client._retries import Attempts
from lossd_client._storage import Storage

if TYPE_CHECKING:
    from lossd_client._shared_memory.pool import Pool

R = TypeVar("R")

WINDOW = 8
"""Items of a stream that are on their way unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream(Generic[R]):
    """The stream twin of a method, which takes one item a request.

    Attributes:
        method: Name of the method without its twin's suffix.
        make: Returns the request for an item, as if it were the only one, packed into a storage.
        read: Makes the result of an item's answer, which may lie in that storage.
        window: Most items that are on their way: sent, and not yet taken as results.
        return_exceptions: Whether a refused item's error is its result, instead of being raised.
    """

    method: str
    make: Callable[[Any, Storage], Sequence[Piece]]
    read: Callable[[Parcel[Any], Storage], R]
    window: int
    return_exceptions: bool

    def __post_init__(self) -> None:
        """Refuses a window without room with `ValueError`."""
        if self.window < 1:
            raise ValueError(f"window is {self.window}, want at least 1")

    @property
    def path(self) -> str:
        """What gRPC calls the method."""
        return method_path(f"{self.method}Stream")

    def request(self, index: int, item: Any, storage: Storage) -> list[Buffer]:
        """Returns the pieces of an item's request; raises `LossdError` for one that cannot be sent."""
        try:
            return placed(envelope(index, self.make(item, storage)))
        except LossdError as error:
            raise at_item(error, index) from None

    def answer(self, data: bytes) -> Parcel[Any]:
        """Returns what the bytes of an answer hold."""
        return read_answer(f"{self.method}Stream", data)

    def result(self, answer: Parcel[Any], storage: Storage) -> R:
        """Returns the result of an item that was evaluated."""
        return read_result(self.method, self.read, Parcel(answer.message.response, answer.payloads), storage)


class OnTheirWay(Generic[R]):
    """The items of a stream that have no answer yet, over all calls that it takes to get one.

    A call ends where the server goes away, and is let run out where the server turns an item away for
    the time being: what has no answer then is sent again, in order, on the next.

    Threads that share it hold a lock of theirs, except for `outcome`.

    Args:
        stream: The stream.
        attempts: Those at getting answers.
    """

    def __init__(self, stream: Stream[R], attempts: Attempts) -> None:
        self._stream = stream
        self._attempts = attempts
        self._items: dict[int, Any] = {}
        self._storages: dict[int, Storage] = {}
        self._lost: dict[int, Storage] = {}
        self._unsent: deque[int] = deque()
        self._count = 0
        self._are_all_here = False
        self._call = 0
        self._refusal: LossdError | None = None

    def add(self, item: Any) -> None:
        """Takes in the next item."""
        if not self._are_all_here:
            self._items[self._count] = item
            self._unsent.append(self._count)
            self._count += 1

    def end(self, before: int | None = None) -> None:
        """Takes in that there are no more items, or none from some place on."""
        self._are_all_here = True
        if before is not None:
            self._unsent.clear()
            for index in [index for index in list(self._items) if index >= before]:
                self._items.pop(index, None)  # one by one, since answers come in meanwhile

    def begin(self) -> int:
        """Begins a call, on which everything is to be sent that has no answer; returns its number."""
        self._abandon()
        self._refusal = None
        self._unsent = deque(sorted(self._items))
        self._call += 1
        return self._call

    def close(self) -> None:
        """Gives up what was not answered."""
        self._abandon()
        self._items.clear()
        self._unsent.clear()
        self._are_all_here = True
        self._call += 1

    def has_news(self, call: int) -> bool:
        """Returns whether there is anything to tell the one who sends on a call."""
        return bool(self._unsent) or self._is_over(call) or self._are_all_here

    def next(self, call: int) -> tuple[int, Any] | None:
        """Returns the item to send next on a call, and its place; None where there is none any more."""
        if self._is_over(call) or not self._unsent:
            return None
        index = self._unsent.popleft()
        return index, self._items[index]

    def storage(self, index: int, pool: "Pool | None") -> Storage:
        """Returns what to pack an item into."""
        lost = self._lost.pop(index, None)
        return Storage(pool) if lost is None else lost.again()

    def will_send(self, call: int, index: int, storage: Storage) -> bool:
        """Takes in what an item was packed into; returns whether its call is still there to send it on."""
        if call == self._call:
            self._storages[index] = storage
        return call == self._call

    def drop(self, call: int, index: int) -> bool:
        """Takes in that an item cannot be sent; returns whether that is this call's to say."""
        if call == self._call:
            self._items.pop(index, None)
        return call == self._call

    def outcome(self, data: bytes) -> tuple[int, R | LossdError] | None:
        """Returns which item an answer is for, and its result or why it was refused.

        Returns None for one that is to be sent again.
        """
        answer = self._stream.answer(data)
        index = answer.message.id
        storage = self._storages.pop(index, Storage(None))
        outcome: R | LossdError
        if answer.message.WhichOneof("outcome") == "error":
            outcome = at_item(error_of_answer(answer.message.error), index)
            if storage.has_lost(outcome):
                self._lost[index] = storage
            if storage.has_lost(outcome) or isinstance(outcome, UnavailableError):
                self._refusal = outcome
                return None
        else:
            outcome = self._stream.result(answer, storage)
        self._items.pop(index, None)
        self._attempts.start_anew()
        return index, outcome

    def pause(self, error: Exception | None) -> float | None:
        """Returns the seconds until the next call, after one that ended; None where all is answered.

        Args:
            error: What it ended with.

        Raises:
            LossdError: There is to be no other call.
        """
        if self._are_all_here and not self._items:
            return None
        error = error or self._refusal
        if isinstance(error, LossdError):
            return 0.0 if self._lost and error is self._refusal else self._attempts.pause_after(error)
        if error is None:
            done = self._count - len(self._items)
            message = f"the server ended the stream after {done} of {self._count} answers"
            error = ServerError(grpc.StatusCode.INTERNAL, message)
        raise error

    def _is_over(self, call: int) -> bool:
        return call != self._call or self._refusal is not None

    def _abandon(self) -> None:
        for storage in self._storages.values():
            storage.abandon()
        self._storages.clear()


def require_size(index: int, size: int, max_bytes: int) -> None:
    """Raises `TooLargeError` for a request that the server does not read: it would end the stream."""
    if size > max_bytes:
        raise too_large(f"items[{index}]", size, max_bytes)


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
