"""A `lossd serve` of its own, as an operator starts it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LOSSD = [sys.executable, "-m", "lossd_server"]


def run(*arguments, **environment):
    """Runs a command to its end, a minute at most."""
    return subprocess.run(
        [*LOSSD, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@contextmanager
def serving(*options, directory=None, **environment):
    """Yields the process and the address of a server on a free port, and ends it with SIGTERM."""
    command = [*LOSSD, "serve", "--listen", "127.0.0.1:0", "--metrics-port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment or None, cwd=directory
    )
    try:
        line = next((line for line in process.stderr if "serving" in line), "")
        yield process, re.search(r"127\.0\.0\.1:\d+", line)[0], line
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Address of a server for the whole session."""
    with serving() as (_, address, _):
        yield address
