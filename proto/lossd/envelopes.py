"""Envelopes, the messages of a stream: the mark of a request, and the request or its answer.

They are written and opened by hand, so that what is in them is not copied for it, and is known again where
it came before. All four of the contract are alike.
"""

from collections.abc import Sequence

from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import NoVarintError, read_varint, varint
from lossd.wire import Buffer
from lossd.writing import Piece, size_of

_MARK_TAG = varint(pb.ComputeLossStreamRequest.ID_FIELD_NUMBER << 3)
_CONTENT_TAG = varint(pb.ComputeLossStreamRequest.REQUEST_FIELD_NUMBER << 3 | 2)


def envelope(mark: int, content: Sequence[Piece]) -> list[Piece]:
    """Returns the envelope of a request or an answer.

    Args:
        mark: The caller's mark, an int64.
        content: What is in it.
    """
    return [envelope_head(mark, size_of(content)), *content]


def envelope_head(mark: int, length: int) -> bytes:
    """Returns what comes before content of so many bytes; protobuf writes no 0."""
    number = _MARK_TAG + varint(mark % (1 << 64)) if mark else b""
    return number + _CONTENT_TAG + varint(length)


def opened(data: Buffer) -> tuple[int, int] | None:
    """Returns the mark of an envelope, and where what is in it begins: it goes to the end.

    None where it is not what `envelope` writes, and so better left to protobuf.
    """
    mark, at = 0, 0
    try:
        if data[:1] == _MARK_TAG:
            mark, at = read_varint(data, 1)
        length, start = read_varint(data, at + 1)
    except NoVarintError:
        return None
    if mark >= 1 << 63:
        mark -= 1 << 64
    if start + length != len(data) or data[:start] != envelope_head(mark, length):
        return None
    return mark, start
