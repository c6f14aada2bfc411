"""The Unix socket that takes regions: one thread for all connections, nothing that a peer can hold up."""

import contextlib
import os
import selectors
import socket
import stat
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from lossd.shared_memory import ENDING, Answer, Frame, FrameError, Request
from lossd_server.errors import ConfigurationError, Reason
from lossd_server.shared_memory.mapping import RefusedError
from lossd_server.shared_memory.packets import Packet, peer_uid, send
from lossd_server.shared_memory.regions import Owner, Regions
from lossd_server.unix_sockets import permissions

MAX_CONNECTIONS = 64
"""Connections at a time. One without a region makes room for a new one."""

_BACKLOG = 128
"""Connections that wait to be let in; beyond them a client without patience is turned away."""
_PAUSE_SECONDS = 0.05
"""How long nobody is let in when this process has no descriptors left."""

_log = structlog.get_logger()


@dataclass(kw_only=True, slots=True, eq=False)
class _Connection:
    socket: socket.socket
    owner: Owner = field(default_factory=Owner)


class RegionListener:
    """Takes regions from processes of this user.

    Attributes:
        path: Where it listens, absolute.
        regions: Where regions are kept.

    Args:
        path: Where to listen; a socket that nobody listens on any more is replaced.
        regions: As above.
        mode: Permissions of the socket; whoever may connect, only processes of this user are let in.
    """

    def __init__(self, path: str, regions: Regions, mode: int = 0o600) -> None:
        self._mode = mode
        self.path = os.path.abspath(path)  # noqa: PTH100  # a link stays the link that callers know
        self.regions = regions
        self._connections: dict[_Connection, None] = {}  # in the order of their arrival
        self._thread = threading.Thread(target=self._run, name="lossd-shared-memory", daemon=True)

    def start(self) -> None:
        """Listens.

        Raises:
            ConfigurationError: The path is taken, too long, or not to be written to.
        """
        self._listening = _listen(self.path, self._mode)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Ends all connections and their regions; memory in use stays mapped until it no longer is."""
        if self._thread.is_alive():
            self._wake.close()
            self._thread.join()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._close_all()
                    return
                self._handle(key.data)

    def _handle(self, connection: _Connection | None) -> None:
        try:
            if connection is None:
                self._accept()
            elif connection in self._connections:  # not ended for the sake of another
                self._serve(connection)
        except Exception:  # noqa: BLE001  # one peer's trouble is not the others': this thread serves all
            _log.exception("shared memory")
            if connection is not None:
                self._close(connection)

    def _accept(self) -> None:
        try:
            peer, _ = self._listening.accept()
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            return
        peer.settimeout(0)
        refusal = self._refusal(peer)
        if refusal is not None:
            send(peer, Frame(code=refusal))
            peer.close()
            return
        connection = _Connection(socket=peer)
        self._connections[connection] = None
        self._selector.register(peer, selectors.EVENT_READ, connection)

    def _refusal(self, peer: socket.socket) -> Answer | None:
        """Returns why a peer is not let in, if it is not."""
        if peer_uid(peer) != os.geteuid():
            return Answer.OTHER_USER
        return None if self._make_room() else Answer.TOO_MANY_CONNECTIONS

    def _make_room(self) -> bool:
        """Ends the oldest connection without a region where there is no room for another."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        idle = next((c for c in self._connections if not c.owner.ids), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _serve(self, connection: _Connection) -> None:
        """Reads one packet and answers it."""
        try:
            packet = Packet.receive(connection.socket)
        except BlockingIOError:
            return
        except OSError:  # the peer is gone
            self._close(connection)
            return
        with packet:
            answer = self._answer(connection.owner, packet)
        # A peer that does not read its answers is not waited for.
        if packet.is_end or not send(connection.socket, answer) or answer.code in ENDING:
            self._close(connection)

    def _answer(self, owner: Owner, packet: Packet) -> Frame:
        try:
            request = packet.request()
            if request.code is Request.RELEASE:
                self.regions.release(owner, request.region_id)
                return Frame(code=Answer.DONE, region_id=request.region_id)
            on_gpu = request.code is Request.PASS_GPU
            region_id = self.regions.add(owner, packet.descriptors[0], request.size, on_gpu=on_gpu)
            return Frame(code=Answer.DONE, size=request.size, region_id=region_id)
        except FrameError as error:
            return Frame(code=error.answer)
        except RefusedError as error:
            return Frame(code=error.answer, size=error.limit)

    def _close(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        del self._connections[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self.regions.release_all(connection.owner)

    def _close_all(self) -> None:
        for connection in list(self._connections):
            self._close(connection)
        self._selector.close()
        self._woken.close()
        self._listening.close()
        Path(self.path).unlink(missing_ok=True)


def _listen(path: str, mode: int) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _remove_stale(path)
        with permissions(mode):
            listening.bind(path)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            Reason.INVALID_OPTION,
            f"cannot listen on {path} for shared memory: {error.strerror or error}",
            field="listen",
            path=path,
        ) from error
    listening.settimeout(0)
    return listening


def _remove_stale(path: str) -> None:
    """Removes a socket that a server left behind; any other file, or a served socket, stays in the way."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()
