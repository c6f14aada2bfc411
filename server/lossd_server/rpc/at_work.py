"""A request at work: what it takes, and what is counted of it."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Self, TypeVar

import grpc

from lossd.wire import Buffer
from lossd.writing import Piece, placed, size_of
from lossd_server.errors import LossdError
from lossd_server.rpc.interceptor import ObservedMethod
from lossd_server.rpc.metrics import MethodMetrics
from lossd_server.rpc.stages import Stages
from lossd_server.rpc.status import code_of

T = TypeVar("T")

Packing = Callable[[Sequence[Buffer]], T]
"""Makes what gRPC sends of an answer in pieces."""


class AtWork(AbstractContextManager["AtWork"]):
    """A request at work: a class, since a generator takes three times as long.

    Args:
        metrics: What counts it.
        stages: What times it.
        away: Where it is worked on.
        size: Bytes of the request.
        as_call: What counts it as a call where it is none, but as good as one.

    Attributes:
        stages: As above.
        answer_size: Bytes of its answer, once there is one.
        code: What it ends with.
    """

    __slots__ = ("_as_call", "_away", "_began", "_metrics", "_size", "answer_size", "code", "stages")

    def __init__(
        self,
        metrics: MethodMetrics,
        stages: Stages,
        away: AbstractContextManager[None],
        size: int,
        as_call: ObservedMethod | None,
    ) -> None:
        self.stages = stages
        self.answer_size: int | None = None
        self.code = grpc.StatusCode.OK
        self._as_call = as_call
        self._began = time.monotonic()
        self._metrics = metrics
        self._away = away
        self._size = size

    def __enter__(self) -> Self:
        self._away.__enter__()
        self._metrics.begin(self._size)
        self.stages.begin("decode")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            self.code = code_of(error) if isinstance(error, LossdError) else grpc.StatusCode.INTERNAL
        self._away.__exit__(None, None, None)
        try:
            self.stages.close()
        finally:
            call = self._as_call
            also = () if call is None else call.whole(self.code, time.monotonic() - self._began)
            self._metrics.end(self.stages.seconds, self.answer_size, also)

    def packed(self, answer: Sequence[Piece], pack: Packing[T]) -> T:
        """Returns what gRPC sends of an answer, and counts it."""
        self.stages.begin("encode")
        packed = pack(placed(answer))
        self.answer_size = len(packed) if isinstance(packed, bytes) else size_of(answer)
        return packed
