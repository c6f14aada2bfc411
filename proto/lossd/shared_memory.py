"""The frames of the socket that takes shared-memory regions: what both sides say on it.

The socket is a Unix socket that keeps packets apart (`SOCK_SEQPACKET`), beside the server's gRPC one. A
frame is one packet of exactly `FRAME_BYTES`, little-endian; a client sends one and waits for the one
that answers it.

| bytes | what |
|---|---|
| 0..3 | `LSHM` |
| 4 | version of this format |
| 5 | a `Request` or an `Answer` |
| 6..7 | 0 |
| 8..15 | size of the region, bytes; the limit where an answer is about one; 0 otherwise |
| 16..31 | id of the region; zeros where there is none |
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1
ID_BYTES = 16
ALIGNMENT = 64
"""Slices of a region begin at multiples of this, bytes: a cache line, and the widest vector."""

_MAGIC = b"LSHM"
_NO_ID = bytes(ID_BYTES)
_FORMAT = struct.Struct(f"<4sBB2sq{ID_BYTES}s")

FRAME_BYTES = _FORMAT.size


class Request(IntEnum):
    """What a client asks."""

    PASS = 1
    """Take the region whose descriptor comes along, by `SCM_RIGHTS`, and whose size is said."""
    RELEASE = 2
    """Forget the region of this id."""
    PASS_GPU = 3
    """Take the region of the server's GPU whose descriptor comes along, and whose size is said."""


class Answer(IntEnum):
    """What the server answers."""

    DONE = 128
    """It is done; a region that was passed has the id said."""
    MALFORMED = 129
    """The packet is no frame, or not one descriptor came along; the connection ends."""
    OTHER_VERSION = 130
    """The server speaks the version that its answer bears; the connection ends."""
    TOO_MANY_CONNECTIONS = 131
    """As many connections as the server takes hold regions; this one ends."""
    OTHER_USER = 132
    """Only processes of the server's own user may pass memory; the connection ends."""
    NOT_SEALED = 133
    """The descriptor is no memory file, or not sealed against shrinking and growing."""
    WRONG_SIZE = 134
    """The file is not as large as was said, or empty; or memory of a GPU no multiple of 2 MiB."""
    NOT_MAPPABLE = 135
    """The file, or the memory of a GPU, cannot be mapped for reading and writing in this size."""
    TOO_LARGE = 136
    """This connection would hold more than the bytes said."""
    FULL = 137
    """The server would hold more, over all connections, than the bytes said."""
    TOO_MANY_REGIONS = 138
    """This connection, or the server, would hold more regions than it may."""
    UNKNOWN_REGION = 139
    """This connection has passed no region of that id."""
    NO_GPU = 140
    """The server has no GPU, or it does not share its memory."""


ENDING = frozenset({Answer.MALFORMED, Answer.OTHER_VERSION, Answer.TOO_MANY_CONNECTIONS, Answer.OTHER_USER})
"""The answers after which the server ends the connection."""


class FrameError(ValueError):
    """A packet that is no frame of this version.

    Attributes:
        answer: What the sender is told.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.name)
        self.answer = answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One packet: what it says, and about which region."""

    code: Request | Answer
    size: int = 0
    region_id: bytes = _NO_ID

    def to_bytes(self) -> bytes:
        """Returns the packet."""
        return _FORMAT.pack(_MAGIC, VERSION, self.code, bytes(2), self.size, self.region_id)

    @classmethod
    def from_bytes(cls, packet: bytes, codes: type[Request] | type[Answer]) -> "Frame":
        """Returns the frame in a packet.

        Args:
            packet: Exactly one packet, as it came.
            codes: What is listened for: requests or answers.

        Raises:
            FrameError: It is no frame, of another version, or not of these codes.
        """
        if len(packet) != FRAME_BYTES:
            raise FrameError(Answer.MALFORMED)
        magic, version, code, padding, size, region_id = _FORMAT.unpack(packet)
        if magic != _MAGIC:
            raise FrameError(Answer.MALFORMED)
        if version != VERSION:
            raise FrameError(Answer.OTHER_VERSION)
        if padding != bytes(2) or code not in codes.__members__.values():
            raise FrameError(Answer.MALFORMED)
        return cls(code=codes(code), size=size, region_id=region_id)
