"""Memory files good and bad, and a peer that says whatever it likes on the socket that takes them."""

import array
import contextlib
import fcntl
import gc
import mmap
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from lossd.shared_memory import Answer, Frame, Request
from lossd_server.shared_memory import RegionListener, Regions

PAGE = mmap.PAGESIZE
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@contextlib.contextmanager
def memory_file(size: int = PAGE, seals: int = SEALED, flags: int = 0) -> Iterator[int]:
    """A descriptor of a memory file; closed at the end, as a client may do once it has passed it."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def bytes_of(descriptor: int, size: int = PAGE) -> np.ndarray:
    """The memory as its owner sees it."""
    return np.frombuffer(mmap.mmap(descriptor, size), np.uint8)


class Peer:
    """A connection without manners."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)  # waits where many do; with a timeout it would fail
        self.socket.settimeout(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.socket.close()

    def say(self, packet: bytes, descriptors: list[int] | None = None) -> None:
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors or [])
        self.socket.sendmsg([packet], [rights] if descriptors else [])

    def hear(self) -> Frame | None:
        """The next answer, or None at the end."""
        try:
            packet = self.socket.recv(64)
        except ConnectionResetError:  # it had not read all that was said
            return None
        return Frame.from_bytes(packet, Answer) if packet else None

    def ask(self, packet: bytes, descriptors: list[int] | None = None) -> Frame | None:
        self.say(packet, descriptors)
        return self.hear()

    def pass_region(self, descriptor: int, size: int = PAGE) -> Frame | None:
        return self.ask(Frame(code=Request.PASS, size=size).to_bytes(), [descriptor])

    def release(self, region_id: bytes) -> Frame | None:
        return self.ask(Frame(code=Request.RELEASE, region_id=region_id).to_bytes())


def descriptor_count() -> int:
    """Descriptors that this process has open; threads of gRPC's, of tests before, open and close some."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def memory_file_count() -> int:
    """Memory files that this process has open."""
    gc.collect()
    return sum(_name_of(descriptor).startswith("/memfd:") for descriptor in Path("/proc/self/fd").iterdir())


def _name_of(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:  # closed meanwhile
        return ""


def mapping_count() -> int:
    """Memory files that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:test")


def wait_until(condition, seconds: float = 5.0) -> None:
    """Waits, so many seconds at most, for what another thread or process is about to do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def started(path: str, regions: Regions) -> RegionListener:
    """A listener that listens."""
    listening = RegionListener(path, regions)
    listening.start()
    return listening
