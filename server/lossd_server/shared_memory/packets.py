"""Packets of the socket that takes regions, with the descriptors that came along."""

import array
import os
import socket
import struct
from dataclasses import dataclass
from typing import Self

from lossd.shared_memory import FRAME_BYTES, Answer, Frame, FrameError, Request

_MAX_DESCRIPTORS = 4
"""Descriptors that a packet is looked through for; the kernel closes what is beyond."""

_INT_BYTES = array.array("i").itemsize
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """One packet as it came; a context manager that closes the descriptors with it.

    Attributes:
        data: Its bytes.
        descriptors: What came along.
        is_whole: Whether nothing of either was cut off.
    """

    data: bytes
    descriptors: list[int]
    is_whole: bool

    @classmethod
    def receive(cls, peer: socket.socket) -> "Packet":
        """Returns the next packet; raises `BlockingIOError` when there is none, `OSError` when never."""
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * _INT_BYTES)
        data, messages, flags, _ = peer.recvmsg(FRAME_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in messages:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // _INT_BYTES * _INT_BYTES])
        cut = flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        return cls(data=data, descriptors=descriptors.tolist(), is_whole=not cut)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    @property
    def is_end(self) -> bool:
        """Whether the peer has said its last."""
        return not self.data

    def request(self) -> Frame:
        """Returns the request in it; raises `FrameError` unless it is one, with what belongs to it."""
        frame = Frame.from_bytes(self.data, Request)
        wanted = 0 if frame.code is Request.RELEASE else 1
        if not self.is_whole or len(self.descriptors) != wanted:
            raise FrameError(Answer.MALFORMED)
        return frame


def send(peer: socket.socket, frame: Frame) -> bool:
    """Sends a frame without waiting; returns whether it went."""
    try:
        return peer.send(frame.to_bytes()) == FRAME_BYTES
    except OSError:
        return False


def peer_uid(peer: socket.socket) -> int:
    """Returns the user of the process that connected."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(credentials)
    return int(uid)
