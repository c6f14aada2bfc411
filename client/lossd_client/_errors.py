"""What a call can fail with.

LossdError
├── InvalidInputError     INVALID_ARGUMENT: the request breaks a rule; also a ValueError
├── NotFoundError         NOT_FOUND: no such custom loss; also a LookupError
├── TooLargeError         RESOURCE_EXHAUSTED: more than the server reads, or its device holds
├── AccessError           UNAUTHENTICATED, PERMISSION_DENIED: no good token; also a PermissionError
├── UnavailableError      UNAVAILABLE: no server there, or it is stopping, or RATE_LIMITED; also a
│                         ConnectionError
├── DeadlineError         DEADLINE_EXCEEDED: the timeout passed; also a TimeoutError
└── ServerError           anything else: a fault of the server or of a custom loss
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lossd.v1 import loss_service_pb2 as pb


class LossdError(Exception):
    """A call that failed.

    Attributes:
        code: The gRPC status code.
        reason: Which rule was broken, a value of the contract's `ErrorReason` without its prefix,
            e.g. `LABEL_OUT_OF_RANGE`; empty when the answer did not come from lossd.
        message: What is wrong, for people.
        field: Path of the offending field, e.g. `items[3].focal.targets`; empty when there is none.
        metadata: Every value that the message mentions, by name.
        retry_after: Seconds after which the server would like to be asked again, infinity for never, or
            None where it did not say.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)

    @property
    def value(self) -> str | None:
        """The offending value as text, where the error is about one value."""
        return self.metadata.get("value")

    def __str__(self) -> str:
        return f"{self.message} [{self.reason or self.code.name}]"


def _restored(kind: type[LossdError], args: tuple[Any, ...], attributes: dict[str, Any]) -> LossdError:
    """Returns an error as it was, on the other side of a process boundary."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InvalidInputError(LossdError, ValueError):
    """The request breaks a rule."""


class NotFoundError(LossdError, LookupError):
    """The server has no custom loss of that name."""


class TooLargeError(LossdError):
    """The request is larger than the server reads, or than its device holds."""


class AccessError(LossdError, PermissionError):
    """The server does not know the client's token, or the client has none."""


class UnavailableError(LossdError, ConnectionError):
    """There is no server at the target, it is stopping, or the client's token may ask no more for now."""


class DeadlineError(LossdError, TimeoutError):
    """The timeout passed."""


class ServerError(LossdError):
    """A fault of the server, or of a custom loss."""


_BY_CODE: dict[grpc.StatusCode, type[LossdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLargeError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}

_BY_REASON: dict[str, type[LossdError]] = {"RATE_LIMITED": UnavailableError}
"""Where the code, by gRPC's custom, says less than the reason."""

_PUSHBACK = "grpc-retry-pushback-ms"

_CANCELLED_HERE = {"Locally cancelled by application!", "Channel closed!"}
"""What gRPC says where nobody but the caller ended a call."""

ENDED_WHILE_WRITTEN = "Internal error from Core"
"""What asyncio's gRPC says of a call that ended as something was written to it, whatever it ended with."""

_BROKEN = ("RST_STREAM", ENDED_WHILE_WRITTEN)
"""What it says of a stream that was reset, or ended so."""

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_of_call(error: Any, *, first_item: int = 0) -> LossdError:
    """Returns our error for a failed gRPC call, sync or async.

    Args:
        error: The `grpc.RpcError`.
        first_item: Place of the request's first item in the caller's batch, when that was split.
    """
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in _details_of(error):
        detail.Unpack(info)
        detail.Unpack(retry)
    metadata = dict(info.metadata)
    field = metadata.pop("field", "")
    code = grpc.StatusCode.UNAVAILABLE if _was_cut_off(error, info.reason) else error.code()
    ours = _kind_of(code, info.reason)(
        code,
        error.details() or "",
        reason=info.reason,
        field=field,
        metadata=metadata,
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() or _pushback_of(error),
    )
    return at_item(ours, first_item)


def _was_cut_off(error: Any, reason: str) -> bool:
    """Returns whether a call broke off: a server that stops, or a proxy that loses one, resets its stream."""
    details = error.details() or ""
    if reason:  # lossd's own errors have one
        return False
    if error.code() is grpc.StatusCode.CANCELLED:
        return details not in _CANCELLED_HERE
    return error.code() is grpc.StatusCode.INTERNAL and any(broken in details for broken in _BROKEN)


def _pushback_of(error: Any) -> float | None:
    """Returns gRPC's own word for `retry_after`, which proxies speak too; what is no number means never."""
    for key, value in error.trailing_metadata() or ():
        if key == _PUSHBACK:
            return int(value) / 1000 if value.isdecimal() else math.inf
    return None


def _details_of(error: Any) -> Iterable[Any]:
    """Returns what the server said beside code and message; nothing if it came too late to be its word."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # cancelled here as the server's own status arrived: they contradict each other
        return ()
    return status.details if status else ()


def error_of_answer(error: pb.Error) -> LossdError:
    """Returns our error for a request that was refused on a stream."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    reason = _reason_name(error.reason)
    return _kind_of(code, reason)(
        code,
        error.message,
        reason=reason,
        field=error.field,
        metadata={key: value for key, value in error.metadata.items() if key != "field"},
        retry_after=error.retry_delay_ms / 1000 if error.HasField("retry_delay_ms") else None,
    )


def _kind_of(code: grpc.StatusCode, reason: str) -> type[LossdError]:
    return _BY_REASON.get(reason) or _BY_CODE.get(code, ServerError)


def _reason_name(reason: int) -> str:
    """Returns the name of a reason without its prefix, or its number when this client does not know it."""
    value = pb.ErrorReason.DESCRIPTOR.values_by_number.get(reason)
    return str(reason) if value is None else value.name.removeprefix("ERROR_REASON_")


def at_item(error: LossdError, first_item: int) -> LossdError:
    """Returns an error with its item counted in the caller's whole batch or stream."""
    return type(error)(
        error.code,
        _shifted(error.message, first_item),
        reason=error.reason,
        field=_shifted(error.field, first_item),
        metadata=error.metadata,
        retry_after=error.retry_after,
    )


def refused_here(
    reason: "pb.ErrorReason.ValueType", message: str, *, field: str, **values: object
) -> LossdError:
    """Returns the error of a request that is refused before it is sent."""
    name = _reason_name(reason)
    too_large = reason == pb.ERROR_REASON_MESSAGE_TOO_LARGE
    code = grpc.StatusCode.RESOURCE_EXHAUSTED if too_large else grpc.StatusCode.INVALID_ARGUMENT
    return _BY_CODE[code](
        code,
        f"{field}: {message}",
        reason=name,
        field=field,
        metadata={key: str(value) for key, value in values.items()},
    )


def too_large(field: str, size: int, limit: int) -> LossdError:
    """Returns the error of a message that is larger than the server reads."""
    return refused_here(
        pb.ERROR_REASON_MESSAGE_TOO_LARGE,
        f"is {size} bytes, the server reads {limit} in one message",
        field=field,
        value=size,
        limit=limit,
    )


def _shifted(text: str, first_item: int) -> str:
    """Returns a path, or a message that begins with one, with its item counted in the whole batch."""
    return re.sub(r"^items\[(\d+)\]", lambda match: f"items[{int(match[1]) + first_item}]", text)
