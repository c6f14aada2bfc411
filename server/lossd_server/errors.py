"""What can go wrong, by reason. Knows nothing of transports: `rpc` maps a reason to a status.

```
LossdError
├── InvalidInputError     the caller's data or settings; also a ValueError
├── CustomLossError       the operator's module failed
├── UnavailableError      not now: another replica, or later
├── AccessError           the caller has no token
├── RateLimitedError      the caller's token may ask no more for now
├── SlowBodyError         the caller's message did not come in time
├── DeadlineError         too late
├── CallerGoneError       nobody waits for the answer
├── OutOfMemoryError      too large for the device
└── ConfigurationError    the operator's settings; the server does not start
```
"""

from contextlib import AbstractContextManager
from enum import StrEnum
from types import TracebackType
from typing import Any


class Reason(StrEnum):
    """Which rule was broken; the contract's `ErrorReason` without its prefix."""

    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    """The bytes are no message of the request type."""
    MISSING_FIELD = "MISSING_FIELD"
    """A field that must be set is not."""
    UNEXPECTED_FIELD = "UNEXPECTED_FIELD"
    """A field that does not go with the others is set."""
    INVALID_OPTION = "INVALID_OPTION"
    """A setting is outside its range, or unknown."""
    INVALID_TENSOR = "INVALID_TENSOR"
    """Storage, shape and type of a tensor disagree."""
    INVALID_DTYPE = "INVALID_DTYPE"
    """A type that the field does not take."""
    INVALID_SHAPE = "INVALID_SHAPE"
    """A shape that the field does not take, or that does not go with another."""
    LABEL_OUT_OF_RANGE = "LABEL_OUT_OF_RANGE"
    """A label that is neither a class nor -1."""
    VALUE_OUT_OF_RANGE = "VALUE_OUT_OF_RANGE"
    """A value outside the range of its field."""
    INVERTED_BOX = "INVERTED_BOX"
    """A target box with x2 < x1 or y2 < y1."""
    NOT_FINITE = "NOT_FINITE"
    """NaN or infinity where it is refused."""
    UNKNOWN_CUSTOM_LOSS = "UNKNOWN_CUSTOM_LOSS"
    """No custom loss of that name is loaded."""
    CUSTOM_LOSS_FAILED = "CUSTOM_LOSS_FAILED"
    """A custom loss raised, or returned what is no loss."""
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    """Larger than the server reads."""
    DRAINING = "DRAINING"
    """The server is stopping."""
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    """As many streams as the server serves are open."""
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    """The deadline passed before the work was done."""
    CANCELLED = "CANCELLED"
    """Nobody waits for the answer any more."""
    DEVICE_WEDGED = "DEVICE_WEDGED"
    """The device does not come back from an evaluation."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """The device has not the memory for this request."""
    INTERNAL = "INTERNAL"
    """A fault of the server."""
    UNKNOWN_REGION = "UNKNOWN_REGION"
    """No shared-memory region of that id is open to this caller."""
    INVALID_SLICE = "INVALID_SLICE"
    """A shared slice that does not lie within its region, or overlaps another."""
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """No bearer token that the server knows."""
    RATE_LIMITED = "RATE_LIMITED"
    """The caller's token may ask no more for now."""
    OVERLOADED = "OVERLOADED"
    """As many requests, or bytes of them, are in flight as may be."""
    BODY_TOO_SLOW = "BODY_TOO_SLOW"
    """The body of a call did not come in time."""


class LossdError(Exception):
    """Why a request is refused, fit to be shown to whoever made it.

    Attributes:
        reason: Which rule was broken.
        message: What is wrong, for people, without the field.
        field: Path of the offending field; empty when no single field is at fault.
        values: Every value that the message mentions, by name.
        retry_seconds: When the caller may come again, where that is known.
    """

    retry_seconds: float | None = None

    def __init__(self, reason: Reason, message: str, *, field: str = "", **values: object) -> None:
        super().__init__(reason, message, field)
        self.reason = reason
        self.message = message
        self.field = field
        self.values = {name: str(value) for name, value in values.items()}

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)

    def prefix_field(self, prefix: str) -> None:
        """Puts the path of the enclosing message before the field, as the error travels outwards."""
        self.field = f"{prefix}.{self.field}" if self.field else prefix


class errors_within(AbstractContextManager[None]):  # noqa: N801  # it is used as those of contextlib are
    """Puts a path before the field of whatever is refused inside.

    A class, because a request enters many of these, and a generator takes five times as long.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, LossdError):
            error.prefix_field(self._path)


def _restored(kind: type[LossdError], args: tuple[Any, ...], attributes: dict[str, Any]) -> LossdError:
    """Returns an error as it was, on the other side of a process boundary."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InvalidInputError(LossdError, ValueError):
    """The caller's data or settings break a rule."""


class CustomLossError(LossdError):
    """The operator's module raised, or returned what is no loss."""


class UnavailableError(LossdError):
    """Not now: the server is stopping, as busy as it may be, or its device does not answer."""


class AccessError(LossdError):
    """The caller bears no token that the server knows."""


class RateLimitedError(LossdError):
    """The caller's token may ask no more for now.

    Args:
        message: Which limit was reached.
        retry_seconds: When there is room again.
        **values: Every value that the message mentions, by name.
    """

    def __init__(self, message: str, *, retry_seconds: float, **values: object) -> None:
        super().__init__(Reason.RATE_LIMITED, message, field="", **values)
        self.retry_seconds = retry_seconds


class SlowBodyError(LossdError):
    """The body of a call did not come in time; the call is cancelled already."""


class DeadlineError(LossdError):
    """The caller's deadline passed before its work was done."""


class CallerGoneError(LossdError):
    """Nobody waits for the answer any more: the call was cancelled, or its connection is gone."""


class OutOfMemoryError(LossdError):
    """The device has not the memory for this request."""


class ConfigurationError(LossdError):
    """The operator's settings cannot be served: a port taken, a device missing, a module that fails."""
