"""Where the time of a call goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lossd.v1 import loss_service_pb2 as pb

STAGES = ("decode", "queue", "compute", "encode")


class Stages:
    """Seconds spent in each stage of one call.

    Attributes:
        seconds: By stage; a stage that was not reached is absent.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time until the block ends to a stage."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - began)

    def add(self, stage: str, seconds: float) -> None:
        """Adds time measured elsewhere to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def timings(self) -> pb.StageTimings:
        """Returns the message of the stages so far."""
        return pb.StageTimings(**{f"{stage}_us": round(s * 1e6) for stage, s in self.seconds.items()})
