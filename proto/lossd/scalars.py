"""The numbers of small messages, written by hand.

To make such a message with stock protobuf and have it written is soon done in a loop, and takes far longer in
a call: most of the code has left the processor's caches since the last one.
"""

from collections.abc import Mapping
from struct import Struct
from typing import Any

from lossd.varints import varint

_VARINT, _FIXED64 = 0, 1

_double = Struct("<d").pack


class Scalars:
    """Writes the numbers of messages of a type.

    Args:
        descriptor: The type; its fields are written that hold a double, or a whole number.
    """

    def __init__(self, descriptor: Any) -> None:
        self._doubles = {
            field.name: varint(field.number << 3 | _FIXED64)
            for field in descriptor.fields
            if field.type == field.TYPE_DOUBLE
        }
        self._wholes = {
            field.name: varint(field.number << 3 | _VARINT)
            for field in descriptor.fields
            if field.type in {field.TYPE_INT64, field.TYPE_ENUM}
        }

    def write(self, numbers: Mapping[str, float]) -> bytes:
        """Returns a message with the numbers of some fields by name; whole ones are 0 to 2⁶³ - 1."""
        pieces: list[bytes] = []
        for name, number in numbers.items():
            tag = self._doubles.get(name)
            if tag is None:
                pieces += self._wholes[name], varint(int(number))
            else:
                pieces += tag, _double(number)
        return b"".join(pieces)
