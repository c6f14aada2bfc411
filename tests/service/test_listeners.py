"""Where a server listens, and to whom."""

import os
import stat
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import grpc
import pytest

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.config import ServerConfig
from lossd_server.errors import ConfigurationError, InvalidInputError
from lossd_server.rpc import listeners
from tests.service.support import make_server

ANYONE = ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"]


def is_served(target):
    with grpc.insecure_channel(target) as channel:
        return bool(LossServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=30).version)


def start(**settings):
    server = make_server(**settings)
    try:
        server.start()
    finally:
        server.stop()
    return server


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.9.10:0", "localhost:0", "[::1]:0"])
def test_the_loopback_needs_no_leave(address):
    with make_server(listen=(address,)) as server:
        assert is_served(server.addresses[0])


@pytest.mark.parametrize("address", ANYONE)
def test_plain_text_to_other_machines_is_refused(address):
    with pytest.raises(ConfigurationError, match="--insecure") as caught:
        start(listen=("127.0.0.1:0", address))
    assert (caught.value.field, caught.value.values["address"]) == ("listen", address)


def test_a_name_counts_as_all_that_it_resolves_to(monkeypatch):
    def resolve(_host, *_arguments, **_settings):
        return [(2, 1, 6, "", (ip, 0)) for ip in ("127.0.0.1", "192.0.2.7")]

    monkeypatch.setattr(listeners.socket, "getaddrinfo", resolve)
    with pytest.raises(ConfigurationError, match="more than this machine"):
        start(listen=("somewhere.example:0",))


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(ConfigurationError, match=r"cannot listen on nowhere\.invalid:0"):
        start(listen=("nowhere.invalid:0",))


def on_this_machine(server):
    return f"127.0.0.1:{server.addresses[0].rpartition(':')[2]}"


def test_insecure_lets_other_machines_in():
    with make_server(listen=(ANYONE[0],), insecure=True) as server:
        assert is_served(on_this_machine(server))


def test_tls_needs_no_leave_for_other_machines(authority):
    pair = authority.issue()
    with make_server(listen=(ANYONE[0],), tls_cert=pair.cert, tls_key=pair.key) as server:
        target = on_this_machine(server)
        credentials = grpc.ssl_channel_credentials(authority.pem)
        with grpc.secure_channel(target, credentials) as channel:
            assert LossServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=30).version


def test_metrics_and_calls_are_on_interfaces_of_their_own():
    with make_server(listen=("127.0.0.2:0",), metrics_host="127.0.0.3") as server:
        assert is_served(server.addresses[0])
        metrics = f"http://127.0.0.3:{server.metrics_port}/metrics"
        with urllib.request.urlopen(metrics, timeout=30) as answer:  # http
            assert b"lossd_build_info" in answer.read()
        for elsewhere in (
            f"http://127.0.0.2:{server.metrics_port}",
            f"http://127.0.0.1:{server.metrics_port}",
        ):
            with pytest.raises(OSError, match="refused"):
                urllib.request.urlopen(elsewhere, timeout=30)  # noqa: S310  # http


def permissions(path):
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_both_unix_sockets_have_exactly_the_mode_that_is_asked(tmp_path, mode, umask):
    before = os.umask(umask)
    try:
        with make_server(listen=(f"unix:{tmp_path}/lossd.sock",), unix_mode=mode) as server:
            assert permissions(tmp_path / "lossd.sock") == mode
            assert permissions(tmp_path / "lossd.sock.shm") == mode
            assert is_served(server.addresses[0])
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_unix_socket_is_its_owners_alone_by_default():
    assert ServerConfig().unix_mode == 0o600


def test_a_unix_socket_is_never_more_open_than_asked(tmp_path):
    """Looked at as often as can be while servers start, under an umask that forbids nothing."""
    path, seen, done = tmp_path / "lossd.sock", set(), threading.Event()

    def look():
        while not done.is_set():
            for each in (path, Path(f"{path}.shm")):
                try:
                    seen.add(permissions(each))
                except FileNotFoundError:
                    continue

    before = os.umask(0)
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(3):
            start(listen=(f"unix:{path}",), drain_seconds=0)
    finally:
        done.set()
        watcher.join()
        os.umask(before)
    assert seen == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
@pytest.mark.parametrize(("mode", "is_let_in"), [(0o660, True), (0o600, False)])
def test_a_group_comes_in_where_the_mode_says_so(tmp_path, mode, is_let_in):
    path = tmp_path / "lossd.sock"
    with make_server(listen=(f"unix:{path}",), unix_mode=mode):
        program = (
            "import os, socket, sys; os.setgroups([0]); os.setgid(0); os.setuid(65534)\n"
            "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        )
        for directory in [tmp_path, *tmp_path.parents][:-2]:
            directory.chmod(directory.stat().st_mode | 0o011)
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode == 0) is is_let_in, done.stderr
    assert is_let_in or "PermissionError" in done.stderr


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere/lossd.sock", "No such file or directory"),
        ("x" * 120, "path too long"),
        ("", "Address already in use|Is a directory"),
    ],
)
def test_a_path_that_cannot_be_is_refused_with_the_systems_word(tmp_path, path, why):
    with pytest.raises(ConfigurationError, match=f"cannot listen on .*({why})"):
        start(listen=(f"unix:{tmp_path}/{path}",))


@pytest.mark.parametrize("mode", [0o1000, -1])
def test_a_mode_that_is_none_is_refused(mode):
    with pytest.raises(InvalidInputError) as caught:
        ServerConfig(unix_mode=mode)
    assert caught.value.field == "unix_mode"
