"""How much a caller may ask in a while: token buckets."""

import threading
import time
from collections.abc import Callable

from lossd_server.errors import RateLimitedError


class Bucket:
    """Holds a second's worth of something, and fills at its rate; not for several threads at a time.

    What is taken out of it and not there is a debt, which it fills up first. So the size of a request may
    be taken when it is known, after the request was let in: what went in over any time is at most
    `rate` a second, the second's worth, and what the last request took.

    Args:
        rate: What comes in, a second; above 0.
        clock: Seconds, from any origin.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._capacity = max(rate, 1.0)
        self._level = self._capacity
        self._filled = clock()

    def wait(self) -> float:
        """Returns the seconds until there is one in it; 0 where there is."""
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled) * self.rate)
        self._filled = now
        return max(0.0, (1.0 - self._level) / self.rate)

    def take(self, amount: float) -> None:
        """Takes something out, there or not."""
        self._level -= amount


class Allowance:
    """What one caller may ask: requests and bytes of them.

    Args:
        name: Who it is, for people.
        requests_per_second: None for any number.
        bytes_per_second: Of the messages of requests, as they come; None for any number.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        name: str,
        *,
        requests_per_second: float | None = None,
        bytes_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._requests = Bucket(requests_per_second, clock) if requests_per_second else None
        self._bytes = Bucket(bytes_per_second, clock) if bytes_per_second else None

    def begin(self) -> RateLimitedError | None:
        """Takes one request, or returns why there is none to take for now."""
        with self._lock:
            for bucket, unit in ((self._requests, "requests"), (self._bytes, "bytes")):
                if bucket is not None and (wait := bucket.wait()):
                    return self._refusal(bucket.rate, unit, wait)
            if self._requests is not None:
                self._requests.take(1)
            return None

    def charge(self, size: int) -> None:
        """Takes the bytes of a message that has come."""
        if self._bytes is not None:
            with self._lock:
                self._bytes.wait()  # what came in meanwhile is not lost to a full bucket
                self._bytes.take(size)

    def _refusal(self, rate: float, unit: str, wait: float) -> RateLimitedError:
        return RateLimitedError(
            f"{self._name} may ask {rate:g} {unit} a second, and asked more",
            retry_seconds=wait,
            token=self._name,
            limit=f"{rate:g}",
            unit=f"{unit} a second",
        )
