"""The requests of one stream, one at a time, where its caller waits for each answer before it asks again."""

import threading
from collections.abc import Callable, Iterator

import grpc

from lossd.headers import ONE_AT_A_TIME
from lossd_server.rpc.pipeline import Task


class Lane:
    """Answers the requests of one stream one after another, on the thread that reads them.

    There is nothing to overlap, and a change of threads takes longer than many a request.

    Args:
        check: Called before a request is read; raises a `LossdError` where none is to be.
        hang_up: Ends the call.
    """

    def __init__(self, check: Callable[[], None], hang_up: Callable[[], object]) -> None:
        self._check = check
        self._hang_up = hang_up
        self._lock = threading.Lock()
        self._is_waiting = False

    def answers(self, tasks: Iterator[Task]) -> Iterator[bytes]:
        """Yields the answers; what ends the stream is raised.

        Args:
            tasks: One for each request. What one raises ends the stream.
        """
        try:
            while (task := self._next(tasks)) is not None:
                yield task()
        except grpc.RpcError as error:  # its caller is gone, or was hung up on
            error.__traceback__ = None  # gRPC keeps the error, and that would keep all that this stream holds

    def wake(self) -> None:
        """Ends the stream if it waits for a request; what it works on is answered, and then checked."""
        with self._lock:
            if self._is_waiting:
                self._hang_up()

    def _next(self, tasks: Iterator[Task]) -> Task | None:
        with self._lock:
            self._check()
            self._is_waiting = True
        try:
            return next(tasks, None)
        finally:
            self._is_waiting = False


def is_lane(call: grpc.ServicerContext) -> bool:
    """Whether the caller of a stream says that it waits for each answer before it asks again."""
    return any(key == ONE_AT_A_TIME for key, _ in call.invocation_metadata())
