"""A call of a method: what goes out and what its answer means, whoever waits for it."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError

from lossd.tensors import TensorError
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Buffer, Parcel
from lossd.writing import Piece, placed
from lossd_client._errors import LossdError, ServerError, error_of_call
from lossd_client._results import ServerInfo, read_server_info
from lossd_client._storage import Storage

R = TypeVar("R")

SMALL_BYTES = 1 << 20
"""Every server reads at least this: smaller requests need not ask for its limit."""

_SERVICE = pb.DESCRIPTOR.services_by_name["LossService"].full_name


class Call(NamedTuple, Generic[R]):
    """One call.

    Attributes:
        method: Name of the method.
        request: What is sent, as `lossd.writing` has it.
        read: Makes the result of the answer.
        storage: What the request is packed into.
        first_item: Place of the request's first item in the caller's batch, when that was split.
        goes_in_chunks: Whether the method has a twin whose messages come in chunks, and it is large enough.
        read_usual: Makes the result of an answer in its usual layout, None of any other; None where there is
            no usual one.
    """

    method: str
    request: Sequence[Piece]
    read: Callable[[Parcel[Any]], R]
    storage: Storage
    first_item: int = 0
    goes_in_chunks: bool = False
    read_usual: Callable[[bytes], R | None] | None = None

    @property
    def path(self) -> str:
        """What gRPC calls the method."""
        return method_path(self.method)

    @property
    def path_in_chunks(self) -> str:
        """What gRPC calls its twin whose messages come in chunks."""
        return method_path(f"{self.method}InChunks")

    def outgoing(self) -> bytes | list[Buffer]:
        """Returns the bytes to send: all in one, or the pieces of what goes in chunks."""
        pieces = placed(self.request)
        return pieces if self.goes_in_chunks else b"".join(pieces)

    def result(self, data: Buffer) -> R:
        """Returns what the bytes of an answer mean; raises `ServerError` when they mean nothing."""
        if self.read_usual is not None and isinstance(data, bytes):
            result = self.read_usual(data)
            if result is not None:
                return result
        return read_result(self.method, self.read, read_answer(self.method, data))

    def error(self, error: grpc.RpcError) -> LossdError:
        """Returns our error for a call that failed."""
        return error_of_call(error, first_item=self.first_item)

    def leaves_memory_in_use(self, error: grpc.RpcError) -> bool:
        """Returns whether the server may still write to this call's memory after it failed."""
        return self.storage.is_written_to and not self.error(error).reason


def read_result(method: str, read: Callable[..., R], *answer: Any) -> R:
    """Returns what an answer of a method means; raises `ServerError` for tensors that mean nothing."""
    try:
        return read(*answer)
    except TensorError as error:
        message = f"the server's answer is no {method}Response: {error}"
        raise ServerError(grpc.StatusCode.INTERNAL, message) from error


def method_path(method: str) -> str:
    """Returns what gRPC calls a method."""
    return f"/{_SERVICE}/{method}"


def read_answer(method: str, data: Buffer) -> Parcel[Any]:
    """Returns the answer of a method; raises `ServerError` for bytes that are none."""
    try:
        return Parcel.read(_answer_type(method), data)
    except DecodeError:
        message = f"the server's answer of {len(data)} bytes is no {method}Response"
        raise ServerError(grpc.StatusCode.INTERNAL, message) from None


@lru_cache
def _answer_type(method: str) -> type[Any]:
    found: type[Any] = getattr(pb, f"{method}Response")
    return found


def info_call() -> Call[ServerInfo]:
    """Returns the call that asks a server what it is."""
    return Call(
        method="GetServerInfo",
        request=[pb.GetServerInfoRequest().SerializeToString()],
        read=read_server_info,
        storage=Storage(None),
    )
