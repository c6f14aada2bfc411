"""Large calls, whose messages go and come in chunks."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from lossd.chunks import Assembly, ChunkError, cut
from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Buffer, Parcel
from lossd_client._errors import ENDED_WHILE_WRITTEN, ServerError
from lossd_client._retries import Deadline

_StreamCall: TypeAlias = "grpc.StreamStreamMultiCallable[bytes, bytes]"
_AsyncStreamCall: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"


def send(method: _StreamCall, pieces: Sequence[Buffer], deadline: Deadline, **settings: Any) -> Buffer:
    """Returns the answer to a request.

    Args:
        method: The method.
        pieces: The request, which is read until the call has ended.
        deadline: When it is to be over.
        **settings: Those of a call.

    Raises:
        grpc.RpcError: It failed.
        ServerError: The chunks of the answer are no message.
    """
    assembly = Assembly()
    call: Any = method(cut(pieces), timeout=deadline.remaining(), **settings)
    try:
        for chunk in call:
            assembly.add(Parcel.read(pb.ComputeLossInChunksResponse, chunk))
        return assembly.whole()
    except (DecodeError, ChunkError) as error:
        raise _no_answer(error) from None
    except grpc.RpcError as error:
        error.__traceback__ = None  # it is the call itself, to which gRPC's own frame refers
        raise
    finally:
        call.cancel()  # where it is not over
        del call  # or else what failed is kept, with all that it sent, until it is collected


async def send_async(
    method: _AsyncStreamCall, pieces: Sequence[Buffer], deadline: Deadline, **settings: Any
) -> Buffer:
    """Returns the answer to a request, as `send` does."""
    assembly = Assembly()
    call: Any = method(cut(pieces), timeout=deadline.remaining(), **settings)
    try:
        async for chunk in call:
            assembly.add(Parcel.read(pb.ComputeLossInChunksResponse, chunk))
        return assembly.whole()
    except (DecodeError, ChunkError) as error:
        raise _no_answer(error) from None
    finally:
        call.cancel()


def goes_better_whole(error: Any) -> bool:
    """Returns whether a request that failed in chunks is to go whole, and fares better or is told why not.

    There may be a server that knows no chunks. And asyncio's gRPC does not tell why a call ended that did so
    while a chunk was written.
    """
    return error.code() is grpc.StatusCode.UNIMPLEMENTED or error.details() == ENDED_WHILE_WRITTEN


def _no_answer(error: Exception) -> ServerError:
    return ServerError(grpc.StatusCode.INTERNAL, f"the server's answer is no message in chunks: {error}")
