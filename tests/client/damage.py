"""Messages that came to harm on their way, or on purpose."""

from hypothesis import strategies as st


@st.composite
def damaged(draw, whole):
    """Bytes that may have lost some, or had some changed, put in or sent twice."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        first, second = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = draw(
            st.sampled_from([b"", data[first:second] * 2, b"\x0a\x00", b"\x32\x00", b"\x0b", b"\x0c"])
        )
        some = draw(st.binary(min_size=1, max_size=2))
        edited = {
            "replaced": data[:first] + piece + data[second:],
            "inserted": data[:first] + piece + data[first:],
            "changed": data[:first] + some + data[first + len(some) :],
            "cut": data[:first],
        }
        data = edited[draw(st.sampled_from([*edited]))]
    return data
