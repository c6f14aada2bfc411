"""Notices that the device does not come back from an evaluation, or not at all."""

import threading
from collections.abc import Callable

import structlog

from lossd_server.engine.turns import Turns
from lossd_server.errors import Reason, UnavailableError

_LOOKS = 8
"""How often it looks within the time that it allows."""

_log = structlog.get_logger()


class Watchdog:
    """Turns work away while one evaluation takes too long, and says so.

    Args:
        turns: Who has the device.
        is_lost: Whether the device will answer nothing any more.
        seconds: How long an evaluation may take.
        notify: Called with true when one takes longer or the device is lost, and with false once it has
            ended after all.

    Attributes:
        is_wedged: Whether that is so now.
    """

    def __init__(
        self,
        turns: Turns,
        is_lost: Callable[[], bool],
        seconds: float,
        notify: Callable[[bool], None],
    ) -> None:
        self.is_wedged = False
        self._turns = turns
        self._is_lost = is_lost
        self._seconds = seconds
        self._notify = notify
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lossd-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(min(self._seconds / _LOOKS, 1.0)):
            if (self._is_lost() or self._turns.busy_seconds > self._seconds) != self.is_wedged:
                self._change()

    def _change(self) -> None:
        self.is_wedged = not self.is_wedged
        if self.is_wedged:
            _log.error("the device does not come back", seconds=self._seconds, is_lost=self._is_lost())
            self._turns.refuse(self._refusal)
        else:
            _log.warning("the device is back")
            self._turns.admit()
        self._notify(self.is_wedged)

    def _refusal(self) -> UnavailableError:
        if self._is_lost():
            return UnavailableError(Reason.DEVICE_WEDGED, "the device has failed")
        return UnavailableError(
            Reason.DEVICE_WEDGED,
            f"one evaluation has the device for more than {self._seconds:g} s",
            limit=self._seconds,
        )
