"""What a caller is told of an error: the one place where a reason becomes a gRPC code."""

from math import ceil
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.errors import InvalidInputError, LossdError, Reason, UnavailableError
from lossd_server.rpc.enums import REASONS, number_of

DOMAIN = "lossd"
RETRY_SECONDS = 1.0
"""When a caller that was turned away may come again."""

ELSEWHERE_SECONDS = 0.1
"""The same where a server is stopping: its connections end at once, and other servers are there already."""

_PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""When gRPC itself, in the client, may try again: its own backoff knows nothing of the queue here."""

MAX_VALUE_LENGTH = 256
"""Longest value in the metadata of an error: status details travel in a header of limited size."""

CODES: dict[Reason, grpc.StatusCode] = {
    **dict.fromkeys(Reason, grpc.StatusCode.INVALID_ARGUMENT),
    Reason.UNKNOWN_CUSTOM_LOSS: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_REGION: grpc.StatusCode.NOT_FOUND,
    Reason.CUSTOM_LOSS_FAILED: grpc.StatusCode.INTERNAL,
    Reason.MESSAGE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OUT_OF_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.TOO_MANY_STREAMS: grpc.StatusCode.UNAVAILABLE,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEVICE_WEDGED: grpc.StatusCode.UNAVAILABLE,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Reason.BODY_TOO_SLOW: grpc.StatusCode.CANCELLED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


def code_of(error: LossdError) -> grpc.StatusCode:
    """Returns the gRPC code of an error."""
    return CODES[error.reason]


def status_of(error: LossdError) -> status_pb2.Status:
    """Returns the `google.rpc.Status` of an error: what a unary call fails with."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error))]
    if isinstance(error, InvalidInputError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=shorten(error.field), description=shorten(error.message)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_delay = _retry_milliseconds(error)
    if retry_delay is not None:
        delay = Duration()
        delay.FromMilliseconds(retry_delay)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_of(error).value[0], message=shorten(str(error)))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def grpc_status_of(error: LossdError) -> Any:
    """Returns the same as gRPC takes it, a `grpc.Status`."""
    status: Any = rpc_status.to_status(status_of(error))
    if error.retry_seconds is None:  # a stopping server's callers had better try another at once
        return status
    pushback = (_PUSHBACK_KEY, str(_retry_milliseconds(error)))
    return status._replace(trailing_metadata=(*status.trailing_metadata, pushback))


def stream_error(error: LossdError) -> pb.Error:
    """Returns the same as a message, for an answer on a stream."""
    return pb.Error(
        code=code_of(error).value[0],
        message=shorten(str(error)),
        reason=number_of(REASONS, error.reason),
        field=shorten(error.field),
        metadata=_metadata(error),
        retry_delay_ms=_retry_milliseconds(error),
    )


def _retry_milliseconds(error: LossdError) -> int | None:
    """Returns when to come again, rounded up: never before there is room. None where that is no use."""
    seconds = error.retry_seconds
    if seconds is None and isinstance(error, UnavailableError):
        seconds = ELSEWHERE_SECONDS if error.reason is Reason.DRAINING else RETRY_SECONDS
    return None if seconds is None else ceil(seconds * 1000)


def _metadata(error: LossdError) -> dict[str, str]:
    values = {name: shorten(value) for name, value in error.values.items()}
    return {**values, "field": shorten(error.field)} if error.field else values


def shorten(text: str) -> str:
    """Returns a text that is no longer than what errors carry."""
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"
