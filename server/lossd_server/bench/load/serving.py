"""The servers under load: `lossd serve` in a process of its own, and a bare one to hold it against."""

import collections
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lossd.channel_options import server_options
from lossd_server.bench import process
from lossd_server.bench.load.kinds import ECHO_METHOD
from lossd_server.errors import ConfigurationError, Reason

_BARE_THREADS = 64
"""As many as a server of lossd has."""

_STOP_SECONDS = 20

# It ends with its parent, however that ends.
_PROGRAM = """
import ctypes, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.argv = ["lossd", *sys.argv[1:]]
runpy.run_module("lossd_server", run_name="__main__")
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server to call.

    Attributes:
        address: Where it listens.
        unix_address: Its Unix socket, where it shares memory; None where that is not known.
        pid: Its process; None where it is none of ours.
    """

    address: str
    unix_address: str | None = None
    pid: int | None = None


@contextmanager
def serve(device: str) -> Iterator[Served]:
    """Runs `lossd serve` with the settings of the environment, and yields it once it serves.

    Args:
        device: Where losses are evaluated.

    Raises:
        ConfigurationError: It did not start.
    """
    with tempfile.TemporaryDirectory() as directory:
        unix_address = f"unix:{directory}/lossd.sock"
        listen = ("--listen", "127.0.0.1:0", "--listen", unix_address)
        options = (*listen, "--device", device, "--metrics-port", "-1", "--log-format", "json")
        child = subprocess.Popen(  # noqa: S603  # this interpreter, a module of ours
            [sys.executable, "-c", _PROGRAM, "serve", *options], stderr=subprocess.PIPE, text=True
        )
        try:
            yield Served(address=_address(child), unix_address=unix_address, pid=child.pid)
        finally:
            _stop(child)


def _address(child: "subprocess.Popen[str]") -> str:
    """Waits until a server serves, and lets its further lines go: it must not wait for a reader."""
    lines = child.stderr or iter(())
    reason = "nobody knows why"
    for line in lines:
        event = _event(line)
        if event.get("event") == "serving":
            reader = threading.Thread(target=collections.deque, args=(lines, 0), daemon=True)
            reader.start()
            return str(event["addresses"][0])
        reason = f"{event['field']}: {event['message']}" if "field" in event else line.strip()
    raise ConfigurationError(Reason.INVALID_OPTION, f"the server did not start: {reason}")


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _stop(child: "subprocess.Popen[str]") -> None:
    child.terminate()
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stderr is not None:
        child.stderr.close()


@contextmanager
def serve_bare(answer: bytes) -> Iterator[Served]:
    """Runs a server in a process of its own that gives every caller the same answer, and yields it."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(answer)
        child, address = process.start(__name__, file.name)
        try:
            yield Served(address=address.strip())
        finally:
            process.stop(child)


def main(path: str) -> None:
    """Serves the content of a file until standard input ends."""
    answer = Path(path).read_bytes()
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda _data, _call: answer)
    service, name = ECHO_METHOD.strip("/").split("/")
    server = grpc.server(ThreadPoolExecutor(_BARE_THREADS), options=server_options(2**31 - 1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    process.listening(f"127.0.0.1:{port}")
    server.stop(0).wait()
