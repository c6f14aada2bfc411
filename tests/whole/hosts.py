"""Two hosts on one machine: network namespaces with a wire between them, which can be cut or made bad."""

import contextlib
import itertools
import os
import shutil
import subprocess
from typing import Any

import pytest

_numbers = itertools.count()


class Hosts:
    """A server's host and a caller's.

    Attributes:
        server: Address of the server's.
    """

    def __init__(self) -> None:
        number = f"{os.getpid()}-{next(_numbers)}"
        self._server, self._caller = f"lossd-s-{number}", f"lossd-c-{number}"
        self.server = "10.213.77.1"

    def connect(self) -> None:
        """Makes both; the test is skipped where this machine has no such thing."""
        if os.geteuid() != 0:
            pytest.skip("network namespaces take root")
        for program in ("ip", "iptables"):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program} here")
        try:
            for name, _, _ in self._ends():
                _run("ip", "netns", "add", name)
            (one, wire, _), (other, its_wire, _) = self._ends()
            pair = ("type", "veth", "peer", "name", its_wire, "netns", other)
            _run("ip", "link", "add", wire, "netns", one, *pair)
            for name, end, address in self._ends():
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
                for link in ("lo", end):
                    _run("ip", "-n", name, "link", "set", link, "up")
            self.lose(0.5)
            self.heal()
        except subprocess.CalledProcessError as error:
            self.remove()
            pytest.skip(f"this machine makes no two hosts: {error.stderr.strip()}")

    def remove(self) -> None:
        """Removes both, and so the wire."""
        for name, _, _ in self._ends():
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", name)

    def start_server(self, *command: str, **settings: Any) -> "subprocess.Popen[str]":
        """Starts a program on the server's host."""
        return subprocess.Popen(_on(self._server, *command), text=True, **settings)

    def start_caller(self, *command: str, **settings: Any) -> "subprocess.Popen[str]":
        """Starts a program on the caller's host."""
        return subprocess.Popen(_on(self._caller, *command), text=True, **settings)

    def lose(self, share: float) -> None:
        """Loses a share of the packets in both directions, without a word to anyone."""
        self._drop("-m", "statistic", "--mode", "random", "--probability", str(share))

    def part(self) -> None:
        """Loses all packets."""
        self._drop()

    def heal(self) -> None:
        """Loses none from now on."""
        for name, _, _ in self._ends():
            _run(*_on(name, "iptables", "-F", "OUTPUT"))

    def _drop(self, *which: str) -> None:
        for name, wire, _ in self._ends():
            _run(*_on(name, "iptables", "-A", "OUTPUT", "-o", wire, *which, "-j", "DROP"))

    def _ends(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        return (self._server, "wire-s", self.server), (self._caller, "wire-c", "10.213.77.2")


def _on(host: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", host, *command]


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, text=True, timeout=30)
