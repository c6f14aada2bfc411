"""Messages in chunks: what is large is never whole in gRPC's hands, which takes three times its memory.

Both sides write and read them with this.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import varint
from lossd.wire import Buffer, Parcel

CHUNK_BYTES = 1 << 20
"""What a chunk holds: of 0.5, 1, 1.5 and 2 MiB that in which a call with 51 MB each way was fastest."""

LEAST_BYTES = 4 << 20
"""What clients send in chunks: 6.4 MB take as long as whole or a little less, 51 MB less, and half of it
where malloc gives freed memory back (`lossd bench rpc-M rpc-L`, and with `--plain-malloc`)."""

_LEAST_CHUNKS, _MEAN_BYTES = 64, 16 << 10
"""More chunks than so many, and one for each so many bytes, are not worth their time, or somebody's trap."""

Chunk: TypeAlias = pb.ComputeLossInChunksRequest | pb.ComputeLossInChunksResponse
"""Both are written alike."""

_DATA_TAG = varint(pb.ComputeLossInChunksRequest.DATA_FIELD_NUMBER << 3 | 2)


class ChunkError(ValueError):
    """Chunks that are no message.

    Attributes:
        message_bytes: How long it is, as the first of them says.
        length: What they come to.
    """

    def __init__(self, message: str, message_bytes: int, length: int) -> None:
        super().__init__(message)
        self.message_bytes = message_bytes
        self.length = length


def cut(pieces: Sequence[Buffer], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yields the chunks of a message, serialized.

    Args:
        pieces: Its bytes, at least one; each is copied once, when its chunk is wanted.
        size: What a chunk holds.
    """
    head = pb.ComputeLossInChunksRequest(message_bytes=sum(map(len, pieces))).SerializeToString()
    parts: list[Buffer] = []
    room = size
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            parts.append(rest[:room])
            rest = rest[room:]
            room -= len(parts[-1])
            if not room:
                yield _chunk(head, parts)
                head, parts, room = b"", [], size
    if parts:
        yield _chunk(head, parts)


def _chunk(head: bytes, parts: Sequence[Buffer]) -> bytes:
    return b"".join((head, _DATA_TAG, varint(sum(map(len, parts))), *parts))


def _allocate(size: int) -> memoryview:
    return np.empty(size, np.uint8).data


class Assembly:
    """A message that is put together from its chunks.

    Args:
        allocate: Gives it memory, so many bytes; raises where it may not be so long.
    """

    def __init__(self, allocate: Callable[[int], memoryview] = _allocate) -> None:
        self._allocate = allocate
        self._message: memoryview | None = None
        self._length = 0
        self._count = 0

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self._message is not None and self._length == len(self._message)

    def add(self, chunk: Parcel[Chunk]) -> None:
        """Adds the next chunk.

        Raises:
            ChunkError: The first does not say how long the message is, or they are longer, or far too many.
            Exception: What `allocate` raises.
        """
        if self._message is None:
            self._message = self._begin(chunk.message.message_bytes)
        part = chunk.payloads.get(chunk.message.data)
        length = self._length + len(part)
        if length > len(self._message):
            raise self._error(f"but {length} bytes have come", length)
        self._message[self._length : length] = part
        self._length = length
        self._count += 1
        if self._count > _LEAST_CHUNKS + len(self._message) // _MEAN_BYTES:
            raise self._error(f"but {self._count} chunks have come with {length} bytes of it", length)

    def whole(self) -> memoryview:
        """Returns the message, read-only.

        Raises:
            ChunkError: Some of it is missing.
        """
        if self._message is None or not self.is_whole:
            raise self._error(f"but the chunks ended after {self._length} bytes", self._length)
        return self._message.toreadonly()

    def _begin(self, size: int) -> memoryview:
        if size < 1:
            raise ChunkError(f"is {size} in the first chunk, want at least 1", size, 0)
        return self._allocate(size)

    def _error(self, problem: str, length: int) -> ChunkError:
        size = 0 if self._message is None else len(self._message)
        return ChunkError(f"is {size}, {problem}", size, length)
