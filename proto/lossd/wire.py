"""Messages out of bytes, without a copy of their large tensors: both sides read with this.

Stock protobuf parses everything but payloads, the large runs of bytes in `Tensor.inline`. A reader cuts
them out of the received bytes and leaves a short stand-in for each; what is left is parsed as ever, and so
unknown fields, fields in any order, split and repeated ones mean what protobuf says they mean. What writes
messages is `lossd.writing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from lossd.v1 import loss_service_pb2
from lossd.v1 import tensor_pb2 as pb
from lossd.varints import NoVarintError, read_varint, varint

M = TypeVar("M", bound=Message)
Buffer: TypeAlias = bytes | memoryview
_Fields: TypeAlias = dict[int, "_Fields"]

LARGE_BYTES = 256 << 10
"""Payloads from here on stay where they are: smaller ones are copied sooner than they are found."""

_MARKER = b"\xfflossd payload\0"
"""What a stand-in begins with. It cannot overlap with itself, so that its places can be counted."""

_INDEX_BYTES = 8

_STEP_BYTES = 16 << 10
"""Where fields are smaller than this on average, a walk is not worth its time, or somebody's trap."""

_MINIMUM_STEPS = 64

_PAYLOAD: _Fields = {}
"""Stands for `Tensor.inline` among fields to descend into."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP, _END_OF_GROUP, _FIXED32 = range(6)
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _END_OF_GROUP: 0}


class Payloads:
    """The payloads of a message.

    Attributes:
        buffers: As they are, in the order of their stand-ins.
    """

    def __init__(self, buffers: Sequence[Buffer] = ()) -> None:
        self.buffers = list(buffers)

    def __len__(self) -> int:
        return len(self.buffers)

    def clear(self) -> None:
        """Lets go of all payloads; nothing can be read any more."""
        self.buffers.clear()

    def add(self, buffer: Buffer) -> bytes:
        """Returns the stand-in of bytes."""
        self.buffers.append(buffer)
        return _MARKER + (len(self.buffers) - 1).to_bytes(_INDEX_BYTES, "little")

    def place_of(self, inline: Buffer) -> int | None:
        """Returns which payload `Tensor.inline` stands for; None where it stands for itself."""
        if self.buffers and inline[: len(_MARKER)] == _MARKER:
            return int.from_bytes(inline[len(_MARKER) :], "little")
        return None

    def get(self, inline: Buffer) -> Buffer:
        """Returns the payload that `Tensor.inline` stands for: mostly itself."""
        place = self.place_of(inline)
        return inline if place is None else self.buffers[place]


@dataclass(frozen=True, slots=True)
class Parcel(Generic[M]):
    """A message, and beside it the payloads that its tensors hold stand-ins of."""

    message: M
    payloads: Payloads = field(default_factory=Payloads)

    @classmethod
    def read(cls, message_type: type[M], data: Buffer) -> "Parcel[M]":
        """Returns what bytes hold; payloads are views of them.

        Raises:
            DecodeError: They are no message of the type.
        """
        payloads = Payloads()
        if len(data) >= LARGE_BYTES:
            skeleton = _without_payloads(message_type.DESCRIPTOR, data, payloads)
            # A stand-in of the sender's own making would be taken for ours.
            if skeleton is not None and skeleton.count(_MARKER) == len(payloads):
                return cls(message_type.FromString(skeleton), payloads)
            payloads.clear()
        return cls(message_type.FromString(data), payloads)  # type: ignore[arg-type]  # of any buffer


def cut_out(message_type: type[M], data: bytes, most_fields: int) -> tuple[M, list[tuple[int, int]]] | None:
    """Returns a message with a stand-in for the bytes of each of its tensors, and where these lie, in order.

    None where it is better left to protobuf: malformed, unusual, or of more fields than are looked at.
    """
    payloads = Payloads()
    walk = _Walk(data, payloads, least_bytes=0, steps=most_fields)
    try:
        skeleton = b"".join(walk.rewritten(_fields_with_payloads(message_type.DESCRIPTOR), 0, len(data)))
        message = message_type.FromString(skeleton)
    except (_NotUnderstoodError, NoVarintError, DecodeError):
        return None
    return (message, walk.places) if skeleton.count(_MARKER) == len(payloads) else None


class _NotUnderstoodError(Exception):
    """Bytes that are better left to protobuf: malformed, padded, or too many small fields."""


def _without_payloads(descriptor: Any, data: Buffer, payloads: Payloads) -> bytes | None:
    """Returns a message with its payloads moved out; None where protobuf had better see it whole."""
    fields = _fields_with_payloads(descriptor)
    if not fields:
        return None
    steps = _MINIMUM_STEPS + len(data) // _STEP_BYTES
    walk = _Walk(data, payloads, least_bytes=LARGE_BYTES, steps=steps)
    try:
        return b"".join(walk.rewritten(fields, 0, len(data)))
    except (_NotUnderstoodError, NoVarintError):
        return None


class _Walk:
    """A pass over the bytes of a message that moves payloads out.

    It descends only into the fields that may hold one. Whatever it passes over it copies as it lies,
    and so need not judge.

    Attributes:
        places: Where each payload lay, start and stop.

    Args:
        data: The message.
        payloads: Where they go.
        least_bytes: Fields with fewer are left alone.
        steps: How many fields to look at before giving up.
    """

    def __init__(self, data: Buffer, payloads: Payloads, *, least_bytes: int, steps: int) -> None:
        self._data = data
        self._view = memoryview(data)
        self._payloads = payloads
        self._least_bytes = least_bytes
        self._steps = steps
        self.places: list[tuple[int, int]] = []

    def rewritten(self, fields: _Fields, at: int, end: int) -> list[Buffer]:
        """Returns the message between two places, with stand-ins, in pieces.

        Raises:
            _NotUnderstoodError, NoVarintError: It is malformed or unusual there.
        """
        pieces: list[Buffer] = []
        copied = at
        for tag, length_at, start, stop in self._runs(at, end):
            inner = fields.get(tag)
            if inner is None or stop - start < self._least_bytes:
                continue
            if len(varint(stop - start)) != start - length_at:
                raise _NotUnderstoodError  # whether a length may be padded is protobuf's to say
            if inner is _PAYLOAD:
                content: list[Buffer] = [self._payloads.add(self._view[start:stop])]
                self.places.append((start, stop))
            else:
                content = self.rewritten(inner, start, stop)
            pieces += [self._view[copied:length_at], varint(sum(map(len, content))), *content]
            copied = stop
        pieces.append(self._view[copied:end])
        return pieces

    def _runs(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields tag, place of the length, start and stop of each length-delimited field of a message.

        Those within groups are left out: the contract has no groups, they are unknown fields.
        """
        groups = 0
        while at < end:
            self._steps -= 1
            tag, at = read_varint(self._data, at)
            kind = tag & 7
            if kind == _LENGTH_DELIMITED:
                length_at = at
                length, start = read_varint(self._data, at)
                at = start + length
                if at <= end and not groups:
                    yield tag, length_at, start, at
            elif kind == _VARINT:
                _, at = read_varint(self._data, at)
            elif kind in _FIXED_BYTES:
                at += _FIXED_BYTES[kind]
                groups += (kind == _GROUP) - (kind == _END_OF_GROUP)
            if kind > _FIXED32 or groups < 0 or self._steps < 0:
                raise _NotUnderstoodError
        if at != end or groups:
            raise _NotUnderstoodError


def _fields_with_payloads(descriptor: Any) -> _Fields:
    """Returns the fields of a message type that may hold payloads, by tag, each with its own."""
    if descriptor.full_name not in _known_fields:
        _known_fields[descriptor.full_name] = _find_fields(descriptor)
    return _known_fields[descriptor.full_name]


def _find_fields(descriptor: Any) -> _Fields:
    found: _Fields = {}
    for member in descriptor.fields:
        if member.message_type is not None and (inner := _fields_with_payloads(member.message_type)):
            found[_tag(member.number)] = inner
    return found


def _tag(number: int) -> int:
    return number << 3 | _LENGTH_DELIMITED


_known_fields: dict[str, _Fields] = {
    pb.Tensor.DESCRIPTOR.full_name: {_tag(pb.Tensor.INLINE_FIELD_NUMBER): _PAYLOAD},
    **{
        chunk.DESCRIPTOR.full_name: {_tag(chunk.DATA_FIELD_NUMBER): _PAYLOAD}
        for chunk in (
            loss_service_pb2.ComputeLossInChunksRequest,
            loss_service_pb2.ComputeLossInChunksResponse,
        )
    },
}
