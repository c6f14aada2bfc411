"""Bearer tokens: who is let in, what each may ask, and that nobody's token is ever written down."""

import logging
import threading
import time

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.config import ServerConfig
from lossd_server.errors import ConfigurationError
from lossd_server.rpc import Server
from tests.service.metrics import eventually, value
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    make_server,
    refusal,
    refusal_of,
)

ALICE, BOB, CAROL = (f"{name}-0123456789abcdef" for name in ("alice", "bob", "carol"))
FILE = f"""
[alice]
token = "{ALICE}"
[bob]
token = "{BOB}"
requests_per_second = 1
[carol]
token = "{CAROL}"
bytes_per_second = 1000
"""


def bearing(token):
    return {"metadata": (("authorization", f"Bearer {token}"),)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def server(file):
    with make_server(tokens=str(file)) as running:
        yield running


@pytest.fixture
def stub(server):
    with connect(server) as made:
        yield made


def is_served(stub, token=ALICE):
    return len(stub.ComputeLoss(good_loss_request(), timeout=30, **bearing(token)).results) == 1


def refused(stub, metadata=()):
    return refusal(lambda: stub.ComputeLoss(good_loss_request(), timeout=30, metadata=metadata))


def test_a_known_token_is_served_by_every_method(stub):
    assert is_served(stub)
    assert stub.AssignTargets(good_assign_request(), **bearing(ALICE)).results
    assert stub.GetServerInfo(pb.GetServerInfoRequest(), **bearing(ALICE)).version
    request = pb.ComputeLossStreamRequest(id=7, request=good_loss_request())
    assert next(stub.ComputeLossStream(iter([request]), **bearing(ALICE))).id == 7


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", ALICE),),
        (("authorization", f"Basic {ALICE}"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {ALICE}x"),),
        (("authorization", f"Bearer {ALICE[:-1]}"),),
        (("authorization", "Bearer alice"),),
        (("authorization", f"Bearer {ALICE}, {BOB}"),),
        (("authorization", f"Bearer {'x' * 4000}"),),
        (("x-authorization", f"Bearer {ALICE}"),),
    ],
)
def test_without_a_known_token_a_call_is_refused_and_the_next_is_served(server, stub, metadata):
    found = refused(stub, metadata)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert ALICE not in found.message
    assert is_served(stub)
    eventually(lambda: value(server, "lossd_refusals_total", reason="UNAUTHENTICATED") == 1)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_written_in_any_case(stub, scheme):
    metadata = (("authorization", f"{scheme} {ALICE}"),)
    assert stub.ComputeLoss(good_loss_request(), metadata=metadata).results


def test_streams_without_a_token_are_refused(stub):
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.AssignTargetsStream(iter(())))
    assert refusal_of(caught.value).reason == "UNAUTHENTICATED"


def test_a_call_without_a_token_is_refused_before_its_body_is_there(server):
    released = threading.Event()

    def bodies():
        released.wait(30)
        yield b""

    with grpc.insecure_channel(server.addresses[0]) as channel:
        call = channel.stream_unary("/lossd.v1.LossService/ComputeLoss").future(bodies(), timeout=20)
        assert refusal_of(call.exception()).reason == "UNAUTHENTICATED"
        released.set()


def test_health_is_open_and_reflection_is_not(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert refusal_of(caught.value).reason == "UNAUTHENTICATED"


class WithToken(grpc.StreamStreamClientInterceptor):
    """Gives every stream a token."""

    def intercept_stream_stream(self, continuation, client_call_details, request_iterator):
        return continuation(client_call_details._replace(**bearing(BOB)), request_iterator)


def test_reflection_is_there_for_who_has_a_token(server):
    with grpc.insecure_channel(server.addresses[0]) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithToken()))
        assert "lossd.v1.LossService" in database.get_services()


def test_a_method_that_there_is_none_of_is_said_to_be_none(server):
    with grpc.insecure_channel(server.addresses[0]) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/lossd.v1.LossService/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_unix_sockets_ask_for_a_token_too(tmp_path, file):
    with (
        make_server(listen=(f"unix:{tmp_path}/lossd.sock",), tokens=str(file)) as server,
        connect(server) as stub,
    ):
        assert refused(stub).reason == "UNAUTHENTICATED"
        assert is_served(stub)


def test_more_requests_than_a_token_may_ask_are_refused_with_the_time_to_come_again(stub):
    assert is_served(stub, BOB)
    found = refused(stub, bearing(BOB)["metadata"])
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert found.metadata == {"token": "bob", "limit": "1", "unit": "requests a second"}
    assert 0 < found.retry_seconds <= 1
    assert is_served(stub, ALICE)  # whose token has no limit
    time.sleep(found.retry_seconds)
    assert is_served(stub, BOB)


def refused_if(stub, request):
    try:
        stub.ComputeLoss(request, timeout=30, **bearing(CAROL))
    except grpc.RpcError as error:
        return refusal_of(error)
    return None


def test_more_bytes_than_a_token_may_ask_are_paid_by_the_next_call(stub):
    request = good_loss_request()
    for _ in range(1000 // request.ByteSize()):
        assert stub.ComputeLoss(request, timeout=30, **bearing(CAROL)).results
    found = next(filter(None, (refused_if(stub, request) for _ in range(1000))))
    assert (found.reason, found.metadata["unit"]) == ("RATE_LIMITED", "bytes a second")


def test_a_stream_is_read_no_faster_than_its_token_may_ask_and_none_is_refused(file, server):
    file.write_text(FILE.replace("requests_per_second = 1\n", "requests_per_second = 20\n"))
    with connect(server) as stub:
        requests = (pb.ComputeLossStreamRequest(id=i, request=good_loss_request()) for i in range(30))
        began = time.monotonic()
        answers = list(stub.ComputeLossStream(requests, timeout=60, **bearing(BOB)))
        took = time.monotonic() - began
    assert sorted(answer.id for answer in answers) == list(range(30))
    assert all(answer.HasField("response") for answer in answers)
    assert took >= 0.45  # 20 at once, and 10 more at 20 a second


def test_who_leaves_a_paced_stream_leaves_no_thread_behind(file, server):
    file.write_text(FILE.replace("requests_per_second = 1\n", "requests_per_second = 0.01\n"))
    with connect(server) as stub:
        requests = (pb.ComputeLossStreamRequest(id=i, request=good_loss_request()) for i in range(30))
        stream = stub.ComputeLossStream(requests, timeout=60, **bearing(BOB))
        assert next(stream).id == 0
        stream.cancel()
        eventually(lambda: not any("lossd-reader" in thread.name for thread in threading.enumerate()))
        assert is_served(stub)


def test_a_changed_file_counts_from_the_next_call_and_old_tokens_no_longer(server, stub, file):
    assert is_served(stub, ALICE)
    file.write_text('[dave]\ntoken = "dave-0123456789abcdef"\n')
    assert is_served(stub, "dave-0123456789abcdef")
    assert refused(stub, bearing(ALICE)["metadata"]).reason == "UNAUTHENTICATED"
    assert value(server, "lossd_reloads_total", file="tokens", outcome="ok") == 1


def test_an_old_token_is_good_beside_the_new_one_and_both_have_one_allowance(stub, file):
    new = "bob-abcdef0123456789"
    file.write_text(f'[bob]\ntoken = ["{new}", "{BOB}"]\nrequests_per_second = 0.01\n')
    assert is_served(stub, BOB)
    assert refused(stub, bearing(new)["metadata"]).reason == "RATE_LIMITED"


def test_a_changed_file_gives_nobody_a_fresh_allowance(stub, file):
    assert is_served(stub, BOB)
    file.write_text(FILE.replace("[alice]", "[alicia]"))
    assert refused(stub, bearing(BOB)["metadata"]).reason == "RATE_LIMITED"


BAD_FILES = {
    "not toml": "is no TOML: Expected '='",
    "\udc80": "is no TOML",
    "": "holds no token",
    "alice = 1": "alice has no token",
    "[alice]": "alice has no token",
    "[alice]\ntoken = 12345678901234567890": "alice has no token",
    "[alice]\ntoken = []": "alice has no token",
    f'[alice]\ntoken = ["{ALICE}", 5]': "alice has no token",
    f'[alice]\ntoken = ["{ALICE}", "short"]': "alice has a token of 5 characters",
    '[alice]\ntoken = "short"': "alice has a token of 5 characters, want at least 16",
    '[alice]\ntoken = "with a space in it"': "alice has a token with other characters",
    '[alice]\ntoken = "ünïcödé-0123456789"': "alice has a token with other characters",
    f'[alice]\ntoken = "{ALICE}"\n[bob]\ntoken = "{ALICE}"': "bob has a token of alice",
    f'[alice]\ntoken = "{ALICE}"\nrequests_per_second = 0': "requests_per_second: is 0, want above 0",
    f'[alice]\ntoken = "{ALICE}"\nbytes_per_second = nan': "bytes_per_second: is nan, want above 0",
    f'[alice]\ntoken = "{ALICE}"\nbytes_per_second = "many"': "bytes_per_second: is 'many', want a number",
    f'[alice]\ntoken = "{ALICE}"\nbytes_per_minute = 5': "alice has unknown settings: bytes_per_minute",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_the_operators_error_and_shows_no_token(tmp_path, text):
    path = tmp_path / "tokens.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError) as caught:
        Server(ServerConfig(device="cpu", tokens=str(path)))
    assert caught.value.field == "tokens"
    assert str(path) in caught.value.message
    assert BAD_FILES[text] in caught.value.message
    assert ALICE not in str(caught.value)


def test_a_file_that_is_not_there_is_the_operators_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read .*: No such file"):
        Server(ServerConfig(device="cpu", tokens=str(tmp_path / "gone.toml")))


def test_a_bad_new_file_is_said_once_and_the_old_tokens_stay(server, stub, file, capsys):
    file.write_text(f'[alice]\ntoken = "{BOB}"\nbytes_per_minute = 5')
    assert is_served(stub)
    assert is_served(stub)
    assert value(server, "lossd_reloads_total", file="tokens", outcome="failed") == 1
    log = "".join(capsys.readouterr())
    assert log.count("tokens not reloaded") == 1
    assert BOB not in log


def test_no_token_is_ever_logged(file, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    wrong = "wrong-0123456789abcdef"
    try:
        with make_server(tokens=str(file)) as server, connect(server) as stub:
            assert is_served(stub)
            assert is_served(stub, BOB)
            for token in (BOB, wrong):
                assert refused(stub, bearing(token)["metadata"]).code
            bad = pb.ComputeLossRequest()
            assert refusal(lambda: stub.ComputeLoss(bad, **bearing(ALICE))).reason == "MISSING_FIELD"
            eventually(lambda: value(server, "lossd_refusals_total", reason="MISSING_FIELD") == 1)
    finally:
        structlog.reset_defaults()
    log = "".join(capsys.readouterr()) + caplog.text
    assert log.count("refused") == 3
    for secret in (ALICE, BOB, wrong):
        assert secret not in log
