"""Where the time of a call goes."""

import time

from lossd.scalars import Scalars
from lossd.v1 import loss_service_pb2 as pb

_TIMINGS = Scalars(pb.StageTimings.DESCRIPTOR)

STAGES = ("decode", "queue", "compute", "encode")

_FIELDS = {stage: f"{stage}_us" for stage in STAGES}


class Stages:
    """Seconds spent in each stage of one call, of which it is in one at a time.

    Attributes:
        seconds: By stage, as far as they have ended; a stage that was not reached is absent.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._since = 0.0

    def begin(self, stage: str) -> None:
        """Ends the stage that the call is in, and begins another, unless it is in that one."""
        if stage != self._stage:
            self.end()
            self._stage, self._since = stage, time.monotonic()

    def end(self) -> None:
        """Ends the stage that the call is in, if it is in any."""
        if self._stage is not None:
            self.add(self._stage, time.monotonic() - self._since)
            self._stage = None

    def add(self, stage: str, seconds: float) -> None:
        """Adds time measured elsewhere to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def close(self) -> None:
        """Ends the request."""
        self.end()

    def timings(self) -> bytes:
        """Returns the stages so far, with the one that the call is in, as the contract's `StageTimings`."""
        seconds = self.seconds
        if self._stage is not None:
            spent = time.monotonic() - self._since
            seconds = seconds | {self._stage: seconds.get(self._stage, 0.0) + spent}
        return _TIMINGS.write({_FIELDS[stage]: round(spent * 1e6) for stage, spent in seconds.items()})
