"""Clients of a server with TLS and tokens: the right ones get in, the others are told why."""

import asyncio
import copy
import io
import logging
import multiprocessing
import pickle

import grpc
import numpy as np
import pytest
import torch

from lossd_client import TLS, AccessError, AsyncClient, Client, FocalLoss, UnavailableError
from lossd_client.torch import RemoteLoss
from tests.service.support import make_server

TOKEN = "trainer-0123456789abcdef"  # noqa: S105  # nobody's
SLOW = "slow-0123456789abcdef"
WRONG = "wrong-0123456789abcdef"
FILE = f'[trainer]\ntoken = "{TOKEN}"\n[slow]\ntoken = "{SLOW}"\nrequests_per_second = 0.001\n'
LOGITS, TARGETS = np.ones((4, 3), np.float32), np.array([0, 1, 2, -1])


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def server(tmp_path, authority):
    (tmp_path / "tokens.toml").write_text(FILE)
    pair = authority.issue()
    with make_server(
        tls_cert=pair.cert,
        tls_key=pair.key,
        tls_client_ca=authority.path,
        tokens=str(tmp_path / "tokens.toml"),
    ) as running:
        yield running


@pytest.fixture
def target(server):
    return server.addresses[0]


@pytest.fixture
def tls(authority):
    mine = authority.issue("trainer.example")
    return TLS(ca=authority.path, cert=mine.cert, key=mine.key)


def loss(client):
    return float(client.compute_loss(FocalLoss(), LOGITS, TARGETS).loss)


def is_served(target, **settings):
    with Client(target, timeout=30, **settings) as client:
        return loss(client) > 0


def test_the_client_gets_in_by_call_and_by_stream(target, tls):
    with Client(target, tls=tls, token=TOKEN) as client:
        results = list(client.compute_loss_stream(FocalLoss(), [(LOGITS, TARGETS)] * 3))
        assert {float(result.loss) for result in results} == {loss(client)}
        assert client.server_info().version


def test_the_client_of_asyncio_gets_in_likewise(target, tls):
    async def calls():
        async with AsyncClient(target, tls=tls, token=TOKEN) as client:
            stream = client.compute_loss_stream(FocalLoss(), [(LOGITS, TARGETS)] * 3)
            results = [float(result.loss) async for result in stream]
            alone = await client.compute_loss(FocalLoss(), LOGITS, TARGETS)
            return results, float(alone.loss)

    results, alone = asyncio.run(calls())
    assert results == [alone] * 3


def test_a_token_in_a_file_gets_in(target, tls, token_file):
    assert is_served(target, tls=tls, token=token_file)


def test_a_name_of_ones_own_choice(server, tls, authority):
    port = server.addresses[0].rpartition(":")[2]
    named = TLS(ca=authority.path, cert=tls.cert, key=tls.key, server_name="localhost")
    assert is_served(f"ipv4:127.0.0.1:{port}", tls=named, token=TOKEN)


@pytest.mark.parametrize("token", [None, WRONG])
def test_without_a_good_token_there_is_an_error_of_its_own(target, tls, token):
    with Client(target, tls=tls, token=token) as client:
        with pytest.raises(AccessError) as caught:
            loss(client)
        assert isinstance(caught.value, PermissionError)
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "UNAUTHENTICATED",
        )
        with pytest.raises(AccessError):
            next(client.compute_loss_stream(FocalLoss(), [(LOGITS, TARGETS)]))
    assert is_served(target, tls=tls, token=TOKEN)


def test_asyncio_hears_the_same(target, tls):
    async def call():
        async with AsyncClient(target, tls=tls) as client:
            await client.compute_loss(FocalLoss(), LOGITS, TARGETS)

    with pytest.raises(AccessError):
        asyncio.run(call())


@pytest.mark.parametrize("case", ["plain text", "another authority", "no certificate", "junk for one"])
def test_without_tls_as_the_server_has_it_there_is_no_connection(
    target, tls, authority, stranger, tmp_path, case
):
    (tmp_path / "junk").write_text("junk")
    wrong = {
        "plain text": None,
        "another authority": TLS(ca=stranger.path, cert=tls.cert, key=tls.key),
        "no certificate": TLS(ca=authority.path),
        "junk for one": TLS(ca=tmp_path / "junk", cert=tls.cert, key=tls.key),
    }[case]
    with Client(target, tls=wrong, token=TOKEN, timeout=20) as client, pytest.raises(UnavailableError):
        loss(client)
    assert is_served(target, tls=tls, token=TOKEN)


def test_past_its_limit_a_token_is_told_when_to_come_again(target, tls):
    with Client(target, tls=tls, token=SLOW, timeout=20) as client:
        assert loss(client)
        with pytest.raises(UnavailableError) as caught:
            loss(client)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert 0 < error.retry_after <= 1000
    assert "slow may ask 0.001 requests a second" in error.message


def test_a_token_goes_nowhere_as_plain_text_unless_it_may():
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="plain text"):
            kind("lossd.example:50051", token=TOKEN)
        assert kind("lossd.example:50051", token=TOKEN, insecure=True)


def test_a_client_that_holds_a_token_is_copied_but_in_no_pickle(target, tls):
    with Client(target, tls=tls, token=TOKEN) as client:
        module = RemoteLoss(client, FocalLoss())
        for what in (client, module):
            with pytest.raises(TypeError, match="the path of a file with the token") as caught:
                pickle.dumps(what)
            assert TOKEN not in str(caught.value)
        copied = copy.deepcopy(module)
        assert copied._client is not client
        assert copied(torch.from_numpy(LOGITS), torch.from_numpy(TARGETS)) > 0
        copied._client.close()
        assert TOKEN not in repr(client) + repr(vars(client))


def test_a_client_with_a_tokens_path_works_from_a_pickle_that_has_no_token(target, tls, token_file):
    with Client(target, tls=tls, token=token_file) as client:
        written = io.BytesIO()
        torch.save(RemoteLoss(client, FocalLoss()), written)
        assert TOKEN.encode() not in written.getvalue()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(loss, [client]) == loss(client)


def test_no_token_is_logged_by_the_client(target, tls, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with (
        Client(target, tls=tls, token=WRONG) as client,
        pytest.raises(AccessError) as caught,
    ):
        loss(client)
    written = caplog.text + "".join(capfd.readouterr()) + str(caught.value) + repr(caught.value)
    assert WRONG not in written


def test_several_servers_have_certificates_for_one_name(authority):
    pair = authority.issue()
    settings = {"tls_cert": pair.cert, "tls_key": pair.key}
    with make_server(**settings) as one, make_server(**settings) as other:
        addresses = [one.addresses[0], other.addresses[0]]
        assert is_served(addresses, tls=TLS(ca=authority.path, server_name="localhost"))
        with pytest.raises(ValueError, match="server_name of tls is not set"):
            Client(addresses, tls=TLS(ca=authority.path))
