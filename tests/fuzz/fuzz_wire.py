"""Fuzzes the codec against the official runtime; not collected by pytest.

    pip install atheris
    python -m tests.fuzz.fuzz_wire -max_total_time=60 [folder of inputs to begin with and to add to]

The first byte of an input chooses the message type, the others are the message. It ends at the first
input on which the two disagree, and writes that to a file.
"""

import sys

import atheris

with atheris.instrument_imports(include=["lossd.wire"]):
    from lossd import wire
from tests.domain.oracle_wire import HOT, assert_agrees

# A few bytes are a payload, and no message is too fine to be walked.
wire.LARGE_BYTES = 8
wire._MINIMUM_STEPS = 1 << 20


def main() -> None:
    atheris.Setup(sys.argv, _one_input)
    atheris.Fuzz()


def _one_input(data: bytes) -> None:
    if data:
        assert_agrees(HOT[data[0] % len(HOT)], data[1:])


if __name__ == "__main__":
    main()
