"""Threads for handlers: those of `concurrent.futures`, with less around each call."""

import atexit
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import structlog

_EXIT_SECONDS = 20.0
"""How long the interpreter waits at its end for calls: threads that it ends in compiled code may abort it."""

_log = structlog.get_logger()


class Threads:
    """Runs calls on up to so many threads, which are made as they are wanted.

    It does what gRPC asks of an executor and no more: nobody waits for what a call comes to, and so there
    are no futures. `shutdown` is to be called, or the threads stay.

    Args:
        most: How many threads there may be.
        name: What their names begin with.
        initializer: Called by each of them first.
    """

    def __init__(self, most: int, name: str, initializer: Callable[[], None]) -> None:
        self._most = most
        self._name = name
        self._initializer = initializer
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._free = 0  # threads less calls, of those that have not come together
        self._is_shut_down = False
        self._process = os.getpid()
        atexit.register(self._end)

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> "Call":
        """Has a function called on one of the threads.

        Raises:
            RuntimeError: They were let go, or the system has not one.
        """
        call = Call(function, arguments)
        with self._lock:
            if self._is_shut_down:
                raise RuntimeError("the threads were let go")
            if self._free > 0 or not self._make_thread():
                self._free -= 1
            self._calls.put(call)
        return call

    def shutdown(self) -> None:
        """Forgets the calls that have not begun, and lets each thread go when it has nothing to do."""
        with self._lock:
            self._is_shut_down = True
            try:
                while True:
                    self._calls.get_nowait()
            except Empty:
                pass
            for _ in self._threads:
                self._calls.put(None)
            self._forget_if_over()

    def _make_thread(self) -> bool:
        """Makes a thread for a call; returns whether there is one more. Raises where there is none at all."""
        if len(self._threads) == self._most:
            return False
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            return False
        self._threads.add(thread)
        return True

    def _work(self) -> None:
        try:
            self._prepare()
            while (call := self._calls.get()) is not None:
                call.run()
                del call  # and what it holds, before the next one comes
                with self._lock:
                    self._free += 1
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())
                self._forget_if_over()

    def _prepare(self) -> None:
        try:
            self._initializer()
        except Exception as error:  # noqa: BLE001  # its first call is there already
            _log.error("internal error", exc_info=error)

    def _forget_if_over(self) -> None:
        if self._is_shut_down and not self._threads:
            atexit.unregister(self._end)

    def _end(self) -> None:
        if (
            os.getpid() != self._process
        ):  # in the child of a fork there are no threads, and the lock may be held
            return
        self.shutdown()
        end = time.monotonic() + _EXIT_SECONDS
        for thread in list(self._threads):
            thread.join(max(end - time.monotonic(), 0.0))


class Call:
    """A call that was handed over: its future, as far as gRPC knows."""

    __slots__ = ("_arguments", "_callbacks", "_function", "_is_done", "_lock")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._callbacks: list[Callable[[Call], object]] = []
        self._lock = threading.Lock()
        self._is_done = False

    def run(self) -> None:
        """Makes the call, and says that it is done."""
        try:
            self._function(*self._arguments)
        except BaseException as error:  # noqa: BLE001  # the thread has others to see to
            _log.error("internal error", exc_info=error)
        finally:
            with self._lock:
                self._is_done = True
            for callback in self._callbacks:
                callback(self)

    def add_done_callback(self, callback: Callable[["Call"], object]) -> None:
        """Has a function called when it is done: at once, where it is."""
        with self._lock:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        callback(self)
