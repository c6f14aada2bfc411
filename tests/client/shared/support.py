"""A server behind a Unix socket in a process of its own, and what can be seen of shared memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np

from lossd_client import Client
from tests.client.support import same_bits
from tests.service.support import focal_grid_arrays

SCRIPT = """
import sys, time
from lossd_server.config import ServerConfig
from lossd_server.rpc import Server
settings = {"max_shared_bytes": int(sys.argv[2]), "device": sys.argv[3], "load": sys.argv[4:]}
server = Server(ServerConfig(listen=(sys.argv[1],), metrics_port=None, **settings))
server.start()
print("ready", flush=True)
time.sleep(600)
"""


class Outside:
    """A server to be killed."""

    def __init__(
        self, directory: Path, *load: str, max_shared_bytes: int = 1 << 30, device: str = "cpu"
    ) -> None:
        self.target = f"unix:{directory / 'lossd.sock'}"
        self.socket = directory / "lossd.sock.shm"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, self.target, str(max_shared_bytes), device, *load],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert any(line == "ready\n" for line in self.process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.process.stdout.close()


def memory_files(process: int | str = "self") -> int:
    """Shared regions that a process has mapped or open."""
    maps = Path(f"/proc/{process}/maps").read_text().count("/memfd:lossd")
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]  # noqa: PTH115
    return maps + sum("/memfd:lossd" in link for link in links)


def is_shared(client: Client, array: Any) -> bool:
    """Whether an array lies in memory that the client's server has."""
    pool = client._sharing.pool()
    return pool is not None and pool.find(np.asarray(array)) is not None


def grid(rows=100):
    arrays = focal_grid_arrays(np.random.default_rng(rows), rows)
    return np.tile(arrays["inputs"], (1, 1, 10, 10)), np.tile(arrays["targets"], (1, 10, 10))


def flat(value):
    return value if isinstance(value, list) else [value]


def assert_same(result, expected):
    assert same_bits(result.loss, expected.loss)
    assert result.raw_sums == expected.raw_sums
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert isinstance(result.gradients[name], list) == isinstance(gradient, list)
        assert all(map(same_bits, flat(result.gradients[name]), flat(gradient)))


LOGITS, LABELS = grid()
