"""Numbers as protobuf writes them."""

from functools import lru_cache

_LONGEST = 10
"""Bytes."""


class NoVarintError(ValueError):
    """Bytes that begin with no number."""


@lru_cache(maxsize=4096)
def varint(value: int) -> bytes:
    """Returns a number, at least 0, as protobuf writes it."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Returns the number at a place, and the place after it.

    Raises:
        NoVarintError: There is none.
    """
    value = 0
    for count, byte in enumerate(data[at : at + _LONGEST]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise NoVarintError
