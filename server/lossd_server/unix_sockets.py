"""What both Unix sockets have in common."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def permissions(mode: int) -> Iterator[None]:
    """Gives a socket that is bound inside exactly this mode: at no time can more users connect to it."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)
