"""Replicas that are killed and started again, each on a port of its own."""

import itertools
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.whole.conftest import LOSSD

_START_SECONDS = 120


class Replica:
    """A `lossd serve` that comes back at its address.

    Attributes:
        address: Where it listens.
        exits: What its processes returned, in order.
    """

    def __init__(self, directory: Path, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.exits: list[int] = []
        self._logs = (directory / f"{name}-{number}.log" for number in itertools.count())
        self.start()

    def start(self) -> None:
        """Starts a process, and does not wait for it."""
        self._log = next(self._logs)
        command = [*LOSSD, "serve", "--listen", self.address, "--metrics-port", "-1", "--device", "cpu"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log)

    def wait_until_serving(self) -> None:
        """Waits for its word; fails where it ends instead."""
        end = time.monotonic() + _START_SECONDS
        while not re.search("serving", self._log.read_text()):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, "the replica does not start"
            time.sleep(0.05)

    def end(self, number: signal.Signals) -> None:
        """Ends its process and waits for that."""
        self._process.send_signal(number)
        self.exits.append(self._process.wait(60))
