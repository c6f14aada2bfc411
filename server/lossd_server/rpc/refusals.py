"""Refused requests: each is counted, and written to the log as long as there are not too many."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import structlog

from lossd_server.errors import LossdError
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.series import note
from lossd_server.rpc.status import code_of, grpc_status_of, shorten

LINES_PER_SECOND = 10
"""Most lines of one reason within a second: a server that refuses thousands has better things to do."""

_log = structlog.get_logger()


class Refusals:
    """Counts every refusal, and writes one line for each, up to some a second for each reason.

    A line says how many of its reason went unwritten before it; what is left over, `close` says.

    Args:
        metrics: What counts them.
        clock: Seconds, from any origin.
        mark: Told of each refusal on the thread of its request, if anyone is.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        mark: Callable[[LossdError], None] | None = None,
    ) -> None:
        self._metrics = metrics
        self._mark = mark
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[str, _Lines] = {}

    def abort(self, method: str, error: LossdError, call: grpc.ServicerContext) -> NoReturn:
        """Ends a call with an error, recorded."""
        self.record(method, error, call.peer())
        call.abort_with_status(grpc_status_of(error))

    def record(self, method: str, error: LossdError, peer: str) -> None:
        """Counts a refusal and writes its line.

        Args:
            method: Name of the method.
            error: Why it was refused.
            peer: Who asked, as gRPC names them.
        """
        note((self._metrics.refusals.labels(method, error.reason), 1))
        if self._mark is not None:
            self._mark(error)
        unwritten = self._admit(error.reason)
        if unwritten is None:
            return
        _log.warning(
            "refused",
            method=method,
            code=code_of(error).name,
            reason=str(error.reason),
            field=shorten(error.field),
            message=shorten(error.message),
            peer=peer,
            **_count(unwritten),
        )

    def close(self) -> None:
        """Says what went unwritten."""
        with self._lock:
            lines, self._lines = self._lines, {}
        for reason, of_reason in lines.items():
            if of_reason.unwritten:
                _log.warning("refused", reason=reason, **_count(of_reason.unwritten))

    def _admit(self, reason: str) -> int | None:
        """Returns how many went unwritten before this one, or None where it goes unwritten too."""
        with self._lock:
            return self._lines.setdefault(str(reason), _Lines()).admit(self._clock())


@dataclass(slots=True)
class _Lines:
    """The lines of one reason: since when, how many, and how many were left out since the last."""

    since: float = float("-inf")
    written: int = 0
    unwritten: int = 0

    def admit(self, now: float) -> int | None:
        if now - self.since >= 1:
            self.since, self.written = now, 0
        if self.written >= LINES_PER_SECOND:
            self.unwritten += 1
            return None
        self.written += 1
        unwritten, self.unwritten = self.unwritten, 0
        return unwritten


def _count(unwritten: int) -> dict[str, int]:
    return {"unwritten": unwritten} if unwritten else {}
