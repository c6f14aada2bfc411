"""Where memory cannot be shared, or is lost, everything goes by message."""

import pickle

import grpc
import numpy as np
import pytest

from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd_client import (
    Client,
    FocalLoss,
    ServerError,
    _storage,
)
from lossd_client._shared_memory import pool
from tests.client.shared.support import LABELS, LOGITS, assert_same, is_shared
from tests.service.support import make_server

MEBIBYTE = 1 << 20


def test_over_tcp_nothing_is_shared(both):
    with Client(both.addresses[1]) as client:
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])
        array = client.allocate(LOGITS.shape)
        array[:] = LOGITS
        assert client.compute_loss(FocalLoss(), array, LABELS).loss == result.loss


def test_beyond_the_servers_limit_all_is_inline(tmp_path, monkeypatch, inline):
    monkeypatch.setattr(pool.Region, "step", MEBIBYTE)
    limit = 8 * MEBIBYTE
    expected = inline.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), max_shared_bytes=limit) as server,
        Client(server.addresses[0]) as client,
    ):
        held = []
        for _ in range(5):
            held.append(client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True))
            assert_same(held[-1], expected)
        shared = [is_shared(client, result.gradients["inputs"]) for result in held]
        assert shared[0] != shared[-1]
        assert client.allocate((limit,)).nbytes == 4 * limit
        same = client.allocate((MEBIBYTE // 16, 16))
        assert len(client.compute_losses(FocalLoss(), [(same, np.zeros(len(same), np.int8))] * 6)) == 6
        assert server._sharing.regions.held_bytes <= limit


def test_a_server_that_shares_nothing(tmp_path):
    with (
        make_server(listen=(f"unix:{tmp_path / 'lossd.sock'}",), max_shared_bytes=0) as server,
        Client(server.addresses[0]) as client,
    ):
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])


def test_a_socket_that_takes_nothing(tmp_path, both):
    # The directory that the client knows the server's sockets by may be another, and may miss one.
    (tmp_path / "lossd.sock").symlink_to(both.addresses[0].removeprefix("unix:"))
    with Client(f"unix:{tmp_path / 'lossd.sock'}") as client:
        client._sharing.learn(client.server_info())
        client._sharing._path = str(tmp_path / "gone.shm")
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert not is_shared(client, result.gradients["inputs"])


def test_a_directory_that_the_server_knows_by_another_name(tmp_path, both):
    path = both.addresses[0].removeprefix("unix:")
    for name in ("lossd.sock", "lossd.sock.shm"):
        (tmp_path / name).symlink_to(path.replace("lossd.sock", name))
    with Client(f"unix://{tmp_path / 'lossd.sock'}") as client:
        info = client.server_info()
        client._sharing.learn(
            type(info)(
                **{f: getattr(info, f) for f in info.__slots__ if f != "shared_memory_socket"},
                shared_memory_socket="/elsewhere/lossd.sock.shm",
            )
        )
        result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
        assert is_shared(client, result.gradients["inputs"])


def test_a_region_that_the_server_lost_is_passed_again(both, client):
    array = client.allocate(LOGITS.shape)
    array[:] = LOGITS
    expected = client.compute_loss(FocalLoss(), array, LABELS, gradients=True)
    before = client._sharing.pool()._regions[0].region_id
    regions = both._sharing.regions
    with regions._lock:
        regions._mappings.clear()
    assert_same(client.compute_loss(FocalLoss(), array, LABELS, gradients=True), expected)
    assert client._sharing.pool()._regions[0].region_id != before
    assert is_shared(client, array)


def test_a_server_that_knows_no_region_at_last_gets_messages(both, client, monkeypatch):
    calls = []
    find = both._sharing.regions.find

    def forgetful(region_id):
        calls.append(region_id)
        return find(bytes(16))

    monkeypatch.setattr(both._sharing.regions, "find", forgetful)
    result = client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
    assert len(set(calls)) == 2
    assert not is_shared(client, result.gradients["inputs"])


def test_an_answer_in_memory_that_was_not_given_is_an_error(client):
    storage = _storage.Storage(None)
    place = tensor_pb2.SharedSlice(region_id=bytes(16), offset=64)
    stray = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=LOGITS.shape, shared=place)
    with pytest.raises(ServerError, match="not given"):
        storage.read(stray, Payloads())


def test_a_copy_shares_memory_or_not_as_its_original(target):
    for wanted in (True, False):
        with pickle.loads(pickle.dumps(Client(target, shared_memory=wanted))) as copy:  # noqa: S301
            result = copy.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)
            assert is_shared(copy, result.gradients["inputs"]) == wanted


def test_a_channel_of_the_callers_is_not_asked(both, target):
    with grpc.insecure_channel(target) as channel:
        result = Client(target, channel=channel).compute_loss(
            FocalLoss(), LOGITS[:1, :, :50], LABELS[:1, :50], gradients=True
        )
    assert result.loss > 0
