"""A server in a process of its own, to be mistreated, and what it holds."""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from tests.service.support import good_assign_request, good_loss_request

LONG = bool(os.environ.get("LOSSD_LONG"))
"""Whether tests take their time: by default each is over in some seconds."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    threads: int
    descriptors: int
    regions: int
    rss: int


class Victim:
    """A `lossd serve` of its own; ended by the context that made it."""

    def __init__(self, process: subprocess.Popen, addresses: list[str]) -> None:
        self.process = process
        self.unix_address, self.address = addresses
        self._ps = psutil.Process(process.pid)

    def held(self) -> Held:
        """What it holds at this moment; regions are memory files that it has mapped."""
        maps = self._ps.memory_maps(grouped=False)
        return Held(
            threads=self._ps.num_threads(),
            descriptors=self._ps.num_fds(),
            regions=sum("memfd" in one.path for one in maps),
            rss=self._ps.memory_info().rss,
        )

    def peak_rss(self) -> int:
        """The most memory that was ever resident."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmHWM"].split()[0]) * 1024

    @property
    def is_up(self) -> bool:
        return self.process.poll() is None

    @contextmanager
    def stub(self, **options) -> Iterator[LossServiceStub]:
        with grpc.insecure_channel(self.address, options=list(options.items())) as channel:
            yield LossServiceStub(channel)

    def assert_serves(self) -> None:
        """It is up, and answers good calls on a new connection, at once or when they come again."""
        assert self.is_up
        with self.stub() as stub:
            assert len(_patiently(stub.ComputeLoss, good_loss_request()).results) == 1
            assert len(_patiently(stub.AssignTargets, good_assign_request()).results) == 1


@contextmanager
def victim(directory, *options, **environment) -> Iterator[Victim]:
    """Serves on a Unix socket and on a free port until the context ends; then it must still end by itself."""
    listen = ("--listen", f"unix:{directory}/lossd.sock", "--listen", "127.0.0.1:0")
    command = (sys.executable, "-m", "lossd_server", "serve", *listen, "--metrics-port", "-1")
    process = subprocess.Popen(
        [*command, "--log-format", "json", "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        event = next(e for e in map(_event, process.stderr) if e.get("event") == "serving")
        threading.Thread(target=collections.deque, args=(process.stderr, 0), daemon=True).start()
        yield Victim(process, event["addresses"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _patiently(method: Callable, request: Any) -> Any:
    """Calls; again where that was not answered for want of room."""
    end = time.monotonic() + 30
    while True:
        try:
            return method(request, timeout=30)
        except grpc.RpcError as error:
            # A body that was not received in time while others wanted its place is hung up on.
            if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
                raise
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def _event(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a condition comes true within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
