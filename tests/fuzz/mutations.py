"""Valid requests, spoilt: as messages, as fields of the wire, and as bytes. The same seed, the same ruin."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from tests.domain.wire_bytes import varint
from tests.service.support import CASES, assign_request, loss_request, scene

NUMBERS = (0, 1, 2, 3, 5, 80, 127, 255, 2**16, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -1, -2, -(2**63))
REALS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))


def valid_requests() -> dict[str, list[Any]]:
    """Small good requests, by method."""
    rng = np.random.default_rng(3)
    losses = [
        loss_request(
            case.config, [case.arrays(rng, 2), case.arrays(rng, 3)], gradients=case.module.differentiable
        )
        for case in CASES.values()
    ]
    images = [scene(rng, (64, 96), n) for n in (0, 1, 4)]
    targets = [assign_request(images, format=form) for form in pb.TargetFormat.values()]
    crowd = {**scene(rng, (64, 96), 3), "iscrowd": np.array([0, 1, 0])}
    targets.append(assign_request([crowd]))
    return {
        "ComputeLoss": losses,
        "ComputeLossInChunks": losses,
        "AssignTargets": targets,
        "ComputeLossStream": [pb.ComputeLossStreamRequest(id=i, request=r) for i, r in enumerate(losses)],
        "AssignTargetsStream": [
            pb.AssignTargetsStreamRequest(id=i, request=r) for i, r in enumerate(targets)
        ],
    }


class Mutator:
    """Spoils requests of one method.

    Args:
        requests: Good ones, all of one type.
        seed: Of all that is random.
    """

    def __init__(self, requests: Sequence[Any], seed: int) -> None:
        self._requests = requests
        self._random = random.Random(seed)  # noqa: S311  # not for secrets
        self._ruins: tuple[Callable[[bytes], bytes], ...] = (
            self._flip,
            self._cut,
            self._insert,
            self._splice,
            self._reorder,
            self._repeat_field,
            self._drop_field,
        )

    def request(self) -> bytes:
        """Returns a good request with one to four things wrong with it, or by chance with none."""
        message = type(self._requests[0])()
        message.CopyFrom(self._random.choice(self._requests))
        for _ in range(self._random.choice((0, 1, 1, 2))):
            self._random.choice((self._number, self._number, self._tensor, self._clear))(message)
        data = message.SerializeToString()
        for _ in range(self._random.choice((0, 0, 1, 2))):
            data = self._random.choice(self._ruins)(data)
        return data

    # -- messages ------------------------------------------------------------------------------------

    def _number(self, message: Any) -> None:
        """Sets some number anywhere in the message to one that is seldom good."""
        places = list(_scalars(message))
        if not places:
            return
        owner, field, index = self._random.choice(places)
        value = self._value(field)
        try:
            if index is None:
                setattr(owner, field.name, value)
            else:
                getattr(owner, field.name)[index] = value
        except ValueError:  # beyond the type of the field
            return

    def _value(self, field: FieldDescriptor) -> Any:
        if field.cpp_type in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
            return self._random.choice(REALS)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self._random.random() < 0.5
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._random.randbytes(self._random.choice((0, 1, 3, 16, 64)))
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._random.choice(("", "inputs", "pred", "\0", "é" * 300, "items[0]", "x" * 5000))
        return self._random.choice(NUMBERS)

    def _tensor(self, message: Any) -> None:
        """Changes shape, type or storage of some tensor."""
        tensors = [inner for inner in _messages(message) if isinstance(inner, tensor_pb2.Tensor)]
        if not tensors:
            return
        tensor = self._random.choice(tensors)
        change = self._random.randrange(5)
        if change == 0:
            tensor.dtype = self._random.choice((*tensor_pb2.DataType.values(), 99))
        elif change == 1 and tensor.shape:
            tensor.shape[self._random.randrange(len(tensor.shape))] = self._random.choice(NUMBERS)
        elif change == 2:
            tensor.shape.append(self._random.choice((1, *NUMBERS)))
        elif change == 3:
            tensor.CopyFrom(self._random.choice(tensors))
        else:
            tensor.shared.region_id = self._random.randbytes(self._random.choice((0, 15, 16)))
            tensor.shared.offset = self._random.choice(NUMBERS)

    def _clear(self, message: Any) -> None:
        owner = self._random.choice(list(_messages(message)))
        fields = [field for field, _ in owner.ListFields()]
        if fields:
            owner.ClearField(self._random.choice(fields).name)

    # -- fields of the wire --------------------------------------------------------------------------

    def _within(self, data: bytes, change: Callable[[list[bytes]], list[bytes]], depth: int = 0) -> bytes:
        """Changes the fields of the message, or of some message inside."""
        parts = split_fields(data)
        if not parts:
            return data
        inner = [i for i, part in enumerate(parts) if part[0] & 7 == 2]
        if inner and depth < 5 and self._random.random() < 0.7:
            index = self._random.choice(inner)
            tag, content = _content(parts[index])
            changed = self._within(content, change, depth + 1)
            parts[index] = tag + varint(len(changed)) + changed
            return b"".join(parts)
        return b"".join(change(parts))

    def _reorder(self, data: bytes) -> bytes:
        def shuffled(parts: list[bytes]) -> list[bytes]:
            self._random.shuffle(parts)
            return parts

        return self._within(data, shuffled)

    def _repeat_field(self, data: bytes) -> bytes:
        def repeated(parts: list[bytes]) -> list[bytes]:
            return [*parts, *[self._random.choice(parts)] * self._random.choice((1, 2, 20))]

        return self._within(data, repeated)

    def _drop_field(self, data: bytes) -> bytes:
        def without(parts: list[bytes]) -> list[bytes]:
            del parts[self._random.randrange(len(parts))]
            return parts

        return self._within(data, without)

    # -- bytes ---------------------------------------------------------------------------------------

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return data
        spoilt = bytearray(data)
        for _ in range(self._random.choice((1, 1, 2, 8))):
            spoilt[self._random.randrange(len(spoilt))] ^= 1 << self._random.randrange(8)
        return bytes(spoilt)

    def _cut(self, data: bytes) -> bytes:
        return data[: self._random.randrange(len(data) + 1)]

    def _insert(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data) + 1)
        return data[:at] + self._random.randbytes(self._random.choice((1, 2, 9, 40))) + data[at:]

    def _splice(self, data: bytes) -> bytes:
        other = self._random.choice(self._requests).SerializeToString()
        return data[: self._random.randrange(len(data) + 1)] + other[self._random.randrange(len(other) + 1) :]


def _messages(message: Any) -> Iterator[Any]:
    """The message, and every message inside."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if hasattr(value, "DESCRIPTOR"):
            yield from _messages(value)
        else:
            for entry in list(value.values()) if hasattr(value, "values") else list(value):
                if hasattr(entry, "DESCRIPTOR"):
                    yield from _messages(entry)


def _scalars(message: Any) -> Iterator[tuple[Any, FieldDescriptor, int | None]]:
    """Every number, text and run of bytes that is set, and those that could be: owner, field, place."""
    for owner in _messages(message):
        for field in owner.DESCRIPTOR.fields:
            if field.message_type is not None:
                continue
            if not field.is_repeated:
                yield owner, field, None
            else:
                yield from ((owner, field, index) for index in range(len(getattr(owner, field.name))))


def split_fields(data: bytes) -> list[bytes]:
    """The fields of a message's bytes, each with its tag; none where they are no message."""
    parts, at = [], 0
    try:
        while at < len(data):
            end = _field_end(data, at)
            parts.append(data[at:end])
            at = end
    except (IndexError, DecodeError):
        return []
    return parts if at == len(data) else []


def _field_end(data: bytes, at: int) -> int:
    tag, at = _read_varint(data, at)
    if tag & 7 == 0:
        return _read_varint(data, at)[1]
    if tag & 7 == 2:
        length, at = _read_varint(data, at)
        return at + length
    if tag & 7 in (1, 5):
        return at + (8 if tag & 7 == 1 else 4)
    raise DecodeError("no field")


def _content(part: bytes) -> tuple[bytes, bytes]:
    """Tag, and content of a field of any length."""
    _, after_tag = _read_varint(part, 0)
    _, start = _read_varint(part, after_tag)
    return part[:after_tag], part[start:]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise DecodeError("no varint")
