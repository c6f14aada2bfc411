"""What an answer says: to which request, whether it is the right one, and why it is a refusal."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lossd.v1 import loss_service_pb2 as pb
from lossd_client import LossdError

_ID_TAG, _RESPONSE_TAG = 0x08, 0x12


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A call without a result.

    Attributes:
        reason: The status, and lossd's own reason.
        retry_after: Seconds after which the server would like to be asked again; None where that is
            no matter of time. A failure with it is a refusal, every other one an error.
    """

    reason: str
    retry_after: float | None = None


def result_bytes(method: str, answer: bytes) -> bytes:
    """Returns the part of an answer that is the same whenever it is asked for: all but the timings.

    Raises:
        DecodeError: It is no answer of that method.
    """
    kind: Any = pb.AssignTargetsResponse if "AssignTargets" in method else pb.ComputeLossResponse
    message = kind.FromString(answer)
    message.ClearField("timings")
    return bytes(message.SerializeToString(deterministic=True))


def is_right(method: str, answer: bytes, expected: bytes) -> bool:
    """Returns whether an answer is, but for its timings, the expected one."""
    try:
        return result_bytes(method, answer) == expected
    except DecodeError:
        return False


def read_stream_answer(method: str, answer: bytes) -> tuple[int, bytes | Failure]:
    """Returns which request of a stream an answer belongs to, and the response or why there is none.

    Raises:
        DecodeError: It is no answer of that method.
    """
    # The common case needs no parser: a mark of one byte, then the response to the end.
    if len(answer) > 2 and answer[0] == _ID_TAG and answer[1] < 0x80 and answer[2] == _RESPONSE_TAG:
        return answer[1], answer[_after_varint(answer, 3) :]
    assign = "AssignTargets" in method
    kind: Any = pb.AssignTargetsStreamResponse if assign else pb.ComputeLossStreamResponse
    message = kind.FromString(answer)
    if message.WhichOneof("outcome") == "response":
        return message.id, message.response.SerializeToString()
    error = message.error
    code = next((code for code in grpc.StatusCode if code.value[0] == error.code), grpc.StatusCode.UNKNOWN)
    reason = pb.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")
    again = error.retry_delay_ms / 1e3 if error.HasField("retry_delay_ms") else None
    return message.id, Failure(reason=f"{code.name} {reason}", retry_after=again)


def failure_of(error: grpc.RpcError | LossdError) -> Failure:
    """Returns why a call has no result."""
    if isinstance(error, LossdError):
        reason = error.reason or error.message
        return Failure(reason=f"{error.code.name} {reason}", retry_after=error.retry_after)
    call: Any = error
    reason, retry_after = str(call.details()), None
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return Failure(reason=f"{call.code().name} {reason}", retry_after=retry_after)


def _after_varint(data: bytes, start: int) -> int:
    while data[start] & 0x80:
        start += 1
    return start + 1
