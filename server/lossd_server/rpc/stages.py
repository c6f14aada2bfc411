"""Where the time of a call goes."""

import time
from contextlib import AbstractContextManager

from lossd.v1 import loss_service_pb2 as pb

STAGES = ("decode", "queue", "compute", "encode")

_FIELDS = {stage: f"{stage}_us" for stage in STAGES}


class Stages:
    """Seconds spent in each stage of one call.

    Attributes:
        seconds: By stage; a stage that was not reached is absent.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Adds the time that a `with` block takes to a stage."""
        return _Timed(self, stage)

    def add(self, stage: str, seconds: float) -> None:
        """Adds time measured elsewhere to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def close(self) -> None:
        """Ends the request."""

    def timings(self) -> pb.StageTimings:
        """Returns the stages so far as the contract's message."""
        timings = pb.StageTimings()
        for stage, seconds in self.seconds.items():
            setattr(timings, _FIELDS[stage], round(seconds * 1e6))
        return timings


class _Timed:
    """Times a block: a class, since a generator takes three times as long."""

    __slots__ = ("_began", "_stage", "_stages")

    def __init__(self, stages: Stages, stage: str) -> None:
        self._stages = stages
        self._stage = stage

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_exception: object) -> None:
        self._stages.add(self._stage, time.monotonic() - self._began)
