"""A caller: calls at its pace until it is over, and tallies what comes of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import grpc

from lossd.channel_options import client_options
from lossd_client import Client, FocalLoss, LossdError
from lossd_server.bench.load.answers import Failure, failure_of, is_right, read_stream_answer
from lossd_server.bench.load.kinds import KINDS, Form, focal_arrays
from lossd_server.bench.load.pace import Pace
from lossd_server.bench.load.tally import Tally

CHECK_EVERY = 50
"""Of so many answers of a caller one is compared with the expected one; the first among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is called, and with what.

    Attributes:
        kind: Name of the kind.
        address: Of the server.
        payloads: The requests, as bytes.
        expected: What an answer holds beside its timings; None where answers are not looked at.
        timeout: After which a call is given up, seconds.
    """

    kind: str
    address: str
    payloads: Sequence[bytes]
    expected: bytes | None
    timeout: float

    def check(self, answer: bytes, tally: Tally) -> None:
        """Looks at an answer where its turn has come."""
        if self.expected is not None and tally.seen % CHECK_EVERY == 0:
            tally.count_check(right=is_right(KINDS[self.kind].method, answer, self.expected))
        tally.seen += 1


def connect(address: str) -> grpc.Channel:
    """Returns a connection of its own, which makes no call twice that a server has seen."""
    return grpc.insecure_channel(address, options=client_options())


def run_caller(target: Target, pace: Pace, tally: Tally) -> None:
    """Calls until the pace is over."""
    form = KINDS[target.kind].form
    caller = {Form.STREAM: _run_stream, Form.SHARED: _run_shared}.get(form, _run_unary)
    caller(target, pace, tally)


def _run_unary(target: Target, pace: Pace, tally: Tally) -> None:
    (payload,) = target.payloads
    with connect(target.address) as channel:
        method: Callable[..., bytes] = channel.unary_unary(KINDS[target.kind].method)

        def call() -> int:
            answer = method(payload, timeout=target.timeout)
            target.check(answer, tally)
            return len(payload) + len(answer)

        _repeat(call, pace, tally)


def _run_shared(target: Target, pace: Pace, tally: Tally) -> None:
    values = focal_arrays(target.kind.removeprefix("shared-"))
    size = 2 * values[0].nbytes + values[1].nbytes
    with Client(target.address, timeout=target.timeout, retries=None) as client:
        arrays = [client.allocate(array.shape, array.dtype) for array in values]
        for array, value in zip(arrays, values, strict=True):
            array[:] = value

        def call() -> int:
            client.compute_loss(FocalLoss(), *arrays, gradients=True).release()
            return size

        _repeat(call, pace, tally)


def _repeat(call: Callable[[], int], pace: Pace, tally: Tally) -> None:
    """Makes a call that returns how many bytes it moved, again and again."""
    for due in pace.starts():
        made = time.monotonic()
        try:
            size = call()
        except (grpc.RpcError, LossdError) as error:
            failure = failure_of(error)
            tally.count_failure(made, time.monotonic(), failure)
            pace.pause(failure.retry_after)
        else:
            tally.count_answer(due, time.monotonic(), size)


def _run_stream(target: Target, pace: Pace, tally: Tally) -> None:
    with connect(target.address) as channel:
        method: Callable[..., Iterator[bytes]] = channel.stream_stream(KINDS[target.kind].method)
        starts = pace.starts()
        while time.monotonic() < pace.ends:
            began = time.monotonic()
            stream = _Stream(target, starts, tally)
            left = pace.ends - began + target.timeout
            try:
                stream.run(method, timeout=left, pace=pace)
            except grpc.RpcError as error:
                failure = failure_of(error)
                tally.count_failure(began, time.monotonic(), failure)
                pace.pause(failure.retry_after)


class _Stream:
    """One stream: a request goes out when it is due and one of the window's places is free."""

    def __init__(self, target: Target, starts: Iterator[float], tally: Tally) -> None:
        self._target = target
        self._starts = starts
        self._tally = tally
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._due: dict[int, tuple[float, float]] = {}

    def run(self, method: Callable[..., Iterator[bytes]], *, timeout: float, pace: Pace) -> None:
        for place in range(1, 1 + len(self._target.payloads)):
            self._free.put(place)
        try:
            for answer in method(self._requests(), timeout=timeout):
                self._read(answer, pace)
        finally:
            self._free.put(None)

    def _requests(self) -> Iterator[bytes]:
        """Yields requests; gRPC asks for them on a thread of its own."""
        while (place := self._free.get()) is not None:
            due = next(self._starts, None)
            if due is None:
                return
            self._due[place] = due, time.monotonic()
            yield self._target.payloads[place - 1]

    def _read(self, answer: bytes, pace: Pace) -> None:
        place, outcome = read_stream_answer(KINDS[self._target.kind].method, answer)
        due, made = self._due.pop(place)
        if isinstance(outcome, Failure):
            self._tally.count_failure(made, time.monotonic(), outcome)
            pace.pause(outcome.retry_after)
        else:
            self._target.check(outcome, self._tally)
            size = len(self._target.payloads[place - 1]) + len(answer)
            self._tally.count_answer(due, time.monotonic(), size)
        self._free.put(place)
