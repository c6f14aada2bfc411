"""The requests of one stream, several at a time: the next is read while others are computed or sent."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from queue import SimpleQueue

from lossd_server.engine import Admission
from lossd_server.errors import LossdError

WIDTH = 4
"""Requests of a stream that are worked on or sent at a time; no more are read, and so the caller waits."""

QUIET_SECONDS = 0.1
"""For how long no request has come when the server ends a stream: the end of one whose caller is writing
would be lost, where the connection ends with it."""

LINGER_SECONDS = 1.0
"""How long that is waited for at most."""

Task = Callable[[], bytes]
"""Answers one request."""


class Pipeline:
    """Answers the requests of one stream, each as soon as it is done.

    Args:
        pool: Works on them.
        admission: Counts each until its work is done.
        check: Called before a request is read; raises a `LossdError` where none is to be.
        linger_until: Says until when the stream may be open after that, in seconds of the monotonic clock.
    """

    def __init__(
        self,
        pool: Executor,
        admission: Admission,
        check: Callable[[], None],
        linger_until: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._check = check
        self._linger_until = linger_until
        self._places = threading.Semaphore(WIDTH)
        self._done: SimpleQueue[Future[bytes] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[bytes]] = set()
        self._ended = False
        self._is_turned_away = False
        self._answered = threading.Event()
        self._dropped = threading.Event()
        self._failure: BaseException | None = None

    def answers(self, tasks: Iterator[Task]) -> Iterator[bytes]:
        """Yields the answers. What ends the stream is raised once everything that was read is answered.

        Args:
            tasks: One for each request, read by a thread of their own. What one raises ends the stream.
        """
        reader = threading.Thread(target=self._read, args=(tasks,), name="lossd-reader", daemon=True)
        reader.start()
        try:
            while not self._ended or self._open:
                done = self._done.get()
                if done is None:
                    self._look_up()
                    continue
                error = done.exception()
                if error is None:
                    yield done.result()
                else:
                    self._end(error)
                self._finish(done)
        finally:
            self._close()
        failure, self._failure = self._failure, None
        if failure is None:
            return
        try:
            if self._is_turned_away:
                self._linger()
            raise failure
        finally:
            del failure  # whose traceback leads back to here, and to answers that nobody took

    def wake(self) -> None:
        """Has the check made even where no request comes."""
        self._done.put(None)

    def _look_up(self) -> None:
        """Ends the stream where the check says so; nothing to do where its caller ended it."""
        if not self._ended:
            try:
                self._check()
            except LossdError as error:
                self._is_turned_away = True
                self._end(error)

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._ended = True

    def _linger(self) -> None:
        """Waits until the caller seems to have stopped sending."""
        end = min(time.monotonic() + LINGER_SECONDS, self._linger_until())
        while (left := end - time.monotonic()) > 0 and self._dropped.wait(min(QUIET_SECONDS, left)):
            self._dropped.clear()

    def _read(self, tasks: Iterator[Task]) -> None:
        """Reads requests as long as there are places; whatever ends that, the answers go on.

        Where it was the server, what comes once all is answered is dropped.
        """
        try:
            while self._places.acquire():
                self._look_up()
                task = None if self._ended else next(tasks, None)
                if task is None or not self._begin(task):
                    break
            if task is not None:
                self._dropped.set()
            del task
            self._stop()
            self._answered.wait()
            while self._is_turned_away and next(tasks, None) is not None:
                self._dropped.set()
        except LossdError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001  # the call is gone, or the server
            # gRPC's own frame refers to what it raised, and that to all that this stream holds.
            error.__traceback__ = None
        finally:
            self._stop()

    def _stop(self) -> None:
        """Says that no more is read."""
        self._ended = True
        self.wake()

    def _begin(self, task: Task) -> bool:
        with self._lock:
            if self._ended:
                return False
            future = self._pool.submit(task)
            self._open.add(future)
        self._admission.begin()
        future.add_done_callback(lambda _: self._admission.end())
        future.add_done_callback(self._done.put)
        return True

    def _finish(self, future: Future[bytes]) -> None:
        with self._lock:
            self._open.discard(future)
        self._places.release()

    def _close(self) -> None:
        """Lets the reader go, and what nobody waits for any more."""
        with self._lock:
            self._ended = True
        self._places.release()
        self._answered.set()
        for future in self._open:
            future.cancel()
