"""Messages in chunks: cut and put together, by us and by stock protobuf."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossd.chunks import CHUNK_BYTES, Assembly, ChunkError, cut
from lossd.v1.loss_service_pb2 import ComputeLossInChunksRequest as Chunk
from lossd.wire import LARGE_BYTES, Parcel, Payloads
from tests.domain.wire_bytes import varint

PIECES = st.lists(st.binary(max_size=40), min_size=1, max_size=6).filter(any)
UNKNOWN = varint(99 << 3 | 2) + b"\x03new"


def together(serialized):
    assembly = Assembly()
    for chunk in serialized:
        assembly.add(Parcel.read(Chunk, chunk))
    return bytes(assembly.whole())


def stock_chunks(message, places, *, first=True):
    """The chunks of a message that is cut at some places, as stock protobuf writes them."""
    edges = [0, *sorted(places), len(message)]
    parts = [message[a:b] for a, b in pairwise(edges)]
    return [
        Chunk(message_bytes=len(message) if first and not index else 0, data=part).SerializeToString()
        for index, part in enumerate(parts)
    ]


@given(pieces=PIECES, size=st.integers(4, 50))
def test_stock_protobuf_reads_what_is_cut(pieces, size):
    message = b"".join(pieces)
    read = [Chunk.FromString(chunk) for chunk in cut(pieces, size)]
    assert b"".join(chunk.data for chunk in read) == message
    assert [chunk.message_bytes for chunk in read] == [len(message)] + [0] * (len(read) - 1)
    assert [len(chunk.data) for chunk in read[:-1]] == [size] * (len(read) - 1)
    assert 0 < len(read[-1].data) <= size
    assert together(cut(pieces, size)) == message


@given(data=st.data(), message=st.binary(min_size=1, max_size=200))
def test_chunks_of_any_length_are_put_together(data, message):
    places = data.draw(st.lists(st.integers(0, len(message)), max_size=8))
    serialized = [
        UNKNOWN * data.draw(st.booleans()) + chunk + UNKNOWN * data.draw(st.booleans())
        for chunk in stock_chunks(message, places)
    ]
    assert together(serialized) == message


@pytest.mark.parametrize("length", [LARGE_BYTES - 1, LARGE_BYTES, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_large_messages_are_the_same_after_it(length):
    message = np.random.default_rng(length).bytes(length)
    assert together(cut([message[:7], memoryview(message)[7:]])) == message
    assert together(stock_chunks(message, [length // 3])) == message


def test_bytes_that_look_like_a_stand_in_are_bytes():
    message = (Payloads().add(b"") * LARGE_BYTES)[: 2 * LARGE_BYTES]
    assert together(cut([message])) == message


def test_nothing_is_copied_before_its_chunk_is_wanted():
    array = np.zeros(3 * CHUNK_BYTES, np.uint8)
    serialized = cut([array.data])
    next(serialized)
    array[-1] = 7
    *_, last = serialized
    assert last[-1] == 7


def test_memory_is_asked_for_once_and_by_what_the_first_chunk_says():
    asked = []

    def allocate(size):
        asked.append(size)
        return memoryview(bytearray(size))

    assembly = Assembly(allocate)
    for chunk in stock_chunks(b"abcdef", [2, 4]):
        assembly.add(Parcel.read(Chunk, chunk))
    assert asked == [6]
    assert assembly.whole() == b"abcdef"
    assert assembly.whole().readonly


@pytest.mark.parametrize(
    ("serialized", "message", "message_bytes", "length"),
    [
        ([], "is 0, but the chunks ended after 0 bytes", 0, 0),
        (stock_chunks(b"abc", [], first=False), "is 0 in the first chunk, want at least 1", 0, 0),
        ([Chunk(message_bytes=-1).SerializeToString()], "is -1 in the first chunk", -1, 0),
        (stock_chunks(b"abcdef", [2])[:1], "is 6, but the chunks ended after 2 bytes", 6, 2),
        ([Chunk(message_bytes=2, data=b"abc").SerializeToString()], "is 2, but 3 bytes have come", 2, 3),
        ([*stock_chunks(b"ab", [1]), stock_chunks(b"c", [], first=False)[0]], "is 2, but 3 bytes", 2, 3),
    ],
    ids=["none", "no length", "negative", "cut short", "longer at once", "longer"],
)
def test_chunks_that_are_no_message(serialized, message, message_bytes, length):
    with pytest.raises(ChunkError, match=message) as caught:
        together(serialized)
    assert (caught.value.message_bytes, caught.value.length) == (message_bytes, length)
