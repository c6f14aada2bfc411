"""Serialized messages of the contract in every form that protobuf allows, as hypothesis strategies.

They are written field by field from the descriptors, and so hold what no serializer would write: fields
in any order and more than once, embedded messages in several parts, repeated numbers packed or not,
both members of a oneof, unknown fields and groups, known ones of the wrong wire type, padded varints.
"""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from lossd.wire import _MARKER

_FIXED = {FieldDescriptor.TYPE_DOUBLE: (1, 8), FieldDescriptor.TYPE_FLOAT: (5, 4)}
_LENGTH_DELIMITED = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE}
_DEEPEST = 8


def varint(value: int, padding: int = 0) -> bytes:
    parts = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)] + [0] * padding
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


_numbers = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1))
_rarely = st.integers(0, 19).map(lambda n: n == 0)


@st.composite
def _padded(draw: Any, value: int) -> bytes:
    return varint(value, draw(st.integers(1, 4)) if draw(_rarely) else 0)


@st.composite
def _run(draw: Any, number: int, content: bytes) -> bytes:
    return draw(_padded(number << 3 | 2)) + draw(_padded(len(content))) + content


@st.composite
def _of_any_type(draw: Any, number: int, depth: int = 0) -> bytes:
    """A field that means nothing: unknown, or known and of some wire type or other."""
    kind = draw(st.sampled_from((0, 1, 2, 5) if depth > 2 else (0, 1, 2, 3, 5)))
    tag = varint(number << 3 | kind)
    if kind == 0:
        return tag + draw(_numbers.flatmap(_padded))
    if kind == 2:
        return draw(_run(number, draw(st.binary(max_size=40))))
    if kind == 3:
        inner = draw(st.lists(_of_any_type(draw(st.integers(1, 20)), depth + 1), max_size=3))
        return tag + b"".join(inner) + varint(number << 3 | 4)
    return tag + draw(st.binary(min_size=8 if kind == 1 else 4, max_size=8 if kind == 1 else 4))


@st.composite
def _payload(draw: Any) -> bytes:
    content = draw(st.binary(max_size=60))
    return _MARKER + content if draw(_rarely) else content


@st.composite
def _known(draw: Any, field: FieldDescriptor, depth: int) -> bytes:
    if field.message_type is not None:
        return draw(_run(field.number, draw(message_bytes(field.message_type, depth + 1))))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(_run(field.number, draw(_payload())))
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(_run(field.number, draw(st.text(max_size=8)).encode()))
    wire_type, size = _FIXED.get(field.type, (0, 0))
    one = st.binary(min_size=size, max_size=size) if size else _numbers.map(varint)
    if field.is_repeated and draw(st.booleans()):
        return draw(_run(field.number, b"".join(draw(st.lists(one, max_size=5)))))
    return varint(field.number << 3 | wire_type) + draw(one)


@st.composite
def message_bytes(draw: Any, descriptor: Any, depth: int = 0) -> bytes:
    """The bytes of some message of a type."""
    fields = [f for f in descriptor.fields if depth < _DEEPEST or f.message_type is None]
    # What leads to tensors is what the reader looks at.
    fields += [f for f in fields if f.message_type is not None or f.type == FieldDescriptor.TYPE_BYTES] * 3
    known = st.sampled_from(fields).flatmap(lambda field: _known(field, depth)) if fields else st.just(b"")
    odd = st.integers(1, 40).flatmap(_of_any_type)
    parts = draw(st.lists(st.one_of(known, known, known, known, odd), max_size=4))
    return b"".join(parts)
