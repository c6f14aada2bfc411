"""TLS and mutual TLS: who gets in, who does not, and that the server goes on after those who did not."""

import contextlib
import socket
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.config import ServerConfig
from lossd_server.errors import ConfigurationError, InvalidInputError
from lossd_server.rpc import Server
from tests.service.metrics import value
from tests.service.support import good_loss_request, make_server


def tls(pair, **settings):
    return {"tls_cert": pair.cert, "tls_key": pair.key, **settings}


@contextmanager
def secure(server, authority, pair=None, options=()):
    """A stub that trusts an authority, with a certificate of its own or without."""
    key, certificate = pair.bytes() if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.pem, key, certificate)
    # Not one of the connections that earlier stubs of the same certificates made.
    options = [("grpc.use_local_subchannel_pool", 1), *options]
    with grpc.secure_channel(server.addresses[0], credentials, options) as channel:
        yield LossServiceStub(channel)


def is_served(stub):
    return len(stub.ComputeLoss(good_loss_request(), timeout=30).results) == 1


def is_kept_out(stub):
    """Whether a call fails for want of a connection."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ComputeLoss(good_loss_request(), timeout=30)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def pair(authority):
    return authority.issue()


@pytest.fixture
def server(pair):
    with make_server(**tls(pair)) as running:
        yield running


@pytest.fixture
def mutual(authority, pair):
    with make_server(**tls(pair, tls_client_ca=authority.path)) as running:
        yield running


def test_a_caller_that_knows_the_authority_is_served_by_address_and_by_name(server, authority):
    with secure(server, authority) as stub:
        assert is_served(stub)
    with secure(server, authority, options=[("grpc.ssl_target_name_override", "localhost")]) as stub:
        assert is_served(stub)


def test_a_caller_in_plain_text_is_kept_out(server, authority):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        assert is_kept_out(LossServiceStub(channel))
    with secure(server, authority) as stub:
        assert is_served(stub)


def test_a_caller_that_trusts_another_authority_does_not_talk_to_it(server, authority, stranger):
    with secure(server, stranger) as stub:
        assert is_kept_out(stub)
    with secure(server, authority) as stub:
        assert is_served(stub)


@pytest.mark.parametrize(("names", "expired"), [(["elsewhere.example"], False), ([], True)])
def test_a_certificate_for_another_name_or_time_is_not_trusted(authority, names, expired):
    pair = authority.issue(*names, expired=expired)
    with make_server(**tls(pair)) as server:
        with secure(server, authority) as stub:
            assert is_kept_out(stub)
        authority.issue(into=pair)
        with secure(server, authority) as stub:
            assert is_served(stub)


def test_a_caller_with_a_certificate_of_the_authority_is_served(mutual, authority):
    with secure(mutual, authority, authority.issue("trainer.example")) as stub:
        assert is_served(stub)


@pytest.mark.parametrize("case", ["none", "another authority's", "expired"])
def test_a_caller_without_a_good_certificate_is_kept_out(mutual, authority, stranger, case):
    mine = {
        "none": lambda: None,
        "another authority's": lambda: stranger.issue("trainer.example"),
        "expired": lambda: authority.issue("trainer.example", expired=True),
    }[case]()
    with secure(mutual, authority, mine) as stub:
        assert is_kept_out(stub)
    with secure(mutual, authority, authority.issue("trainer.example")) as stub:
        assert is_served(stub)


def test_a_rotated_certificate_is_served_without_a_restart_and_old_connections_go_on(
    server, authority, stranger, pair
):
    with secure(server, authority) as old:
        assert is_served(old)
        stranger.issue(into=pair)
        with secure(server, stranger) as new:
            assert is_served(new)
        with secure(server, authority) as late:
            assert is_kept_out(late)
        assert is_served(old)
    assert value(server, "lossd_reloads_total", file="certificate", outcome="ok") == 1


def test_a_rotated_authority_of_callers_counts_for_new_connections(mutual, authority, stranger):
    with secure(mutual, authority, stranger.issue("trainer.example")) as stub:
        assert is_kept_out(stub)
    Path(authority.path).write_bytes(authority.pem + stranger.pem)
    with secure(mutual, authority, stranger.issue("trainer.example")) as stub:
        assert is_served(stub)


@pytest.mark.parametrize("fault", ["junk", "gone", "another's key"])
def test_a_broken_new_certificate_is_said_and_the_old_one_stays(
    server, authority, stranger, pair, fault, capsys
):
    {
        "junk": lambda: Path(pair.cert).write_text("junk"),
        "gone": lambda: Path(pair.key).unlink(),
        "another's key": lambda: Path(pair.key).write_bytes(stranger.issue().bytes()[0]),
    }[fault]()
    for _ in range(2):
        with secure(server, authority) as stub:
            assert is_served(stub)
    assert value(server, "lossd_reloads_total", file="certificate", outcome="failed") == 1
    log = "".join(capsys.readouterr())
    assert log.count("certificate not reloaded") == 1
    assert "PRIVATE KEY" not in log
    stranger.issue(into=pair)
    with secure(server, stranger) as stub:
        assert is_served(stub)


def test_a_volume_that_changes_by_a_link_is_seen(tmp_path, authority, stranger):
    """As the kubelet does it: the files are links into a directory that is itself behind a link."""
    for index, source in enumerate((authority, stranger)):
        (tmp_path / f"v{index}").mkdir()
        key, certificate = source.issue().bytes()
        (tmp_path / f"v{index}" / "tls.key").write_bytes(key)
        (tmp_path / f"v{index}" / "tls.crt").write_bytes(certificate)
    data = tmp_path / "..data"
    data.symlink_to("v0")
    for name in ("tls.key", "tls.crt"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    with make_server(tls_cert=str(tmp_path / "tls.crt"), tls_key=str(tmp_path / "tls.key")) as server:
        with secure(server, authority) as stub:
            assert is_served(stub)
        (tmp_path / "..new").symlink_to("v1")
        (tmp_path / "..new").rename(data)
        with secure(server, stranger) as stub:
            assert is_served(stub)


def test_a_connection_that_never_shakes_hands_holds_nobody_up(server, authority):
    idle = [socket.create_connection(address_of(server)) for _ in range(8)]
    with secure(server, authority) as stub:
        assert is_served(stub)
    for each in idle:
        each.close()


def test_who_connects_and_says_nothing_is_let_go(server, authority):
    with make_server() as plain:
        idle = [socket.create_connection(address_of(each)) for each in (server, plain)]
        for each in idle:
            each.settimeout(50)  # gRPC's own patience is longer
            with contextlib.suppress(ConnectionResetError):
                while each.recv(4096):
                    continue
            each.close()
    with secure(server, authority) as stub:
        assert is_served(stub)


def address_of(server):
    host, port = server.addresses[0].split(":")
    return host, int(port)


def test_unix_sockets_stay_plain_text_beside_tls(tmp_path, authority, pair):
    path = f"unix:{tmp_path}/lossd.sock"
    with make_server(listen=("127.0.0.1:0", path), **tls(pair)) as server:
        with secure(server, authority) as stub:
            assert is_served(stub)
        with grpc.insecure_channel(path) as channel:
            assert is_served(LossServiceStub(channel))


def test_health_is_answered_over_tls(server, authority):
    credentials = grpc.ssl_channel_credentials(authority.pem)
    with grpc.secure_channel(server.addresses[0], credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tls_cert": "a"}, "tls_key"),
        ({"tls_key": "a"}, "tls_cert"),
        ({"tls_client_ca": "a"}, "tls_cert"),
    ],
)
def test_files_of_tls_go_together(settings, field):
    with pytest.raises(InvalidInputError) as caught:
        ServerConfig(**settings)
    assert caught.value.field == field


def test_files_that_are_no_use_are_the_operators_error(tmp_path, authority, stranger, pair):
    junk, encrypted = tmp_path / "junk", tmp_path / "encrypted"
    junk.write_bytes(b"\xff junk")
    encrypted.write_bytes(_encrypted(pair.bytes()[0]))
    good = {"tls_cert": pair.cert, "tls_key": pair.key}
    for settings, field, message in [
        ({**good, "tls_cert": str(junk)}, "tls_cert", "are no certificate and its key"),
        ({**good, "tls_cert": str(tmp_path / "gone")}, "tls_cert", "No such file"),
        ({**good, "tls_key": str(tmp_path)}, "tls_key", "Is a directory"),
        ({**good, "tls_key": stranger.issue().key}, "tls_cert", "key values mismatch"),
        ({**good, "tls_key": str(encrypted)}, "tls_cert", "the key is encrypted"),
        ({**good, "tls_client_ca": str(junk)}, "tls_client_ca", "holds no certificate of an authority"),
    ]:
        with pytest.raises(ConfigurationError, match=message) as caught:
            Server(ServerConfig(device="cpu", metrics_port=None, **settings))
        assert caught.value.field == field


def _encrypted(key):
    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
