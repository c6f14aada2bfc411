"""The connection over which regions are passed: they live as long as it does."""

import array
import contextlib
import select
import socket
import weakref

from lossd.shared_memory import FRAME_BYTES, Answer, Frame, FrameError, Request

_TIMEOUT_SECONDS = 5.0
"""How long a server may take to answer; it needs tens of microseconds."""


class NotTakenError(OSError):
    """The server refuses a region; the connection goes on.

    Attributes:
        answer: Why.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"the server takes no such region: {answer.name}")
        self.answer = answer


class Connection:
    """A connection to the socket that takes regions; one request at a time.

    Args:
        path: Where the server listens.

    Raises:
        OSError: Nobody does.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(_TIMEOUT_SECONDS)
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        weakref.finalize(self, self._socket.close)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def pass_region(self, descriptor: int, size: int, request: Request = Request.PASS) -> bytes:
        """Passes a region and returns its id.

        Args:
            descriptor: What the server opens it by.
            size: Bytes.
            request: Of what kind it is.

        Raises:
            NotTakenError: The server refuses it.
            OSError: The connection has ended; so has everything that was passed over it.
        """
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor])
        frame = Frame(code=request, size=size)
        return self._ask(frame, [rights]).region_id

    def release(self, region_id: bytes) -> None:
        """Tells the server to forget a region; raises `OSError` when the connection has ended."""
        self._ask(Frame(code=Request.RELEASE, region_id=region_id), [])

    def has_ended(self) -> bool:
        """Whether the server ended it, which is all that it says unasked."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """Ends the connection; so does the end of this object."""
        self._socket.close()

    def _ask(self, frame: Frame, messages: "list[tuple[int, int, array.array[int]]]") -> Frame:
        # A server that ends a connection says why first: the answer may be there when sending fails.
        with contextlib.suppress(BrokenPipeError):
            self._socket.sendmsg([frame.to_bytes()], messages)
        packet = self._socket.recv(FRAME_BYTES + 1)
        if not packet:
            raise ConnectionResetError("the server ended the connection")
        try:
            answer = Frame.from_bytes(packet, Answer)
        except FrameError as error:
            raise ConnectionAbortedError("the server speaks another protocol") from error
        if answer.code is not Answer.DONE:
            raise NotTakenError(Answer(answer.code))
        return answer
