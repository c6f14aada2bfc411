"""Connections that end at an age of a second, under load: no call is lost, no stream is cut."""

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest

from lossd.channel_options import client_options
from lossd_client import AsyncClient, Client, FocalLoss
from tests.service.support import make_server

SECONDS = 3.5
LOGITS, TARGETS = np.linspace(-3, 3, 40, dtype=np.float32).reshape(8, 5), np.arange(8) % 5


class Connections:
    """A channel, and how often it has connected."""

    def __init__(self, target):
        self.channel = grpc.insecure_channel(target, options=client_options())
        self.count = 0
        self.channel.subscribe(self._on_state)

    def _on_state(self, state):
        self.count += state is grpc.ChannelConnectivity.READY


@pytest.fixture
def server():
    with make_server(max_connection_age_seconds=1) as running:
        yield running


@pytest.fixture
def until():
    return time.monotonic() + SECONDS


def test_no_call_is_lost_where_connections_end_under_load(server, until):
    connections = Connections(server.addresses[0])
    losses, failures = [], []

    def call():
        try:
            # Until it has seen enough: of connections that follow close upon each other it sees one.
            while time.monotonic() < until or (connections.count < 3 and time.monotonic() < until + 60):
                losses.append(float(client.compute_loss(FocalLoss(), LOGITS, TARGETS).loss))
        except Exception as error:  # noqa: BLE001  # whatever it is
            failures.append(error)

    with connections.channel, Client(channel=connections.channel) as client:
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(set(losses)) == 1
    assert connections.count >= 3


def test_a_stream_outlives_its_connections_age(server, until):
    def items():
        while time.monotonic() < until:
            time.sleep(0.05)
            yield LOGITS, TARGETS

    connections = Connections(server.addresses[0])
    with connections.channel, Client(channel=connections.channel) as client:
        results = list(client.compute_loss_stream(FocalLoss(), items()))
        assert len({float(result.loss) for result in results}) == 1
        assert client.server_info().version  # over a connection of its own, the other being too old
    assert len(results) > 10


def test_no_call_of_asyncio_is_lost_either(server, until):
    async def call(client):
        count = 0
        while time.monotonic() < until:
            await client.compute_loss(FocalLoss(), LOGITS, TARGETS)
            count += 1
        return count

    async def calls():
        async with AsyncClient(server.addresses[0]) as client:
            return await asyncio.gather(*[call(client) for _ in range(4)])

    assert min(asyncio.run(calls())) > 0


def test_shared_memory_outlives_the_age_of_connections(tmp_path, until):
    target = f"unix:{tmp_path}/lossd.sock"
    with make_server(listen=(target,), max_connection_age_seconds=1) as server, Client(target) as client:
        logits = client.allocate((64, 5))
        logits[:] = 1
        assert client._sharing.pool() is not None
        losses = set()
        while time.monotonic() < until:
            result = client.compute_loss(FocalLoss(), logits, np.zeros(64, np.int64), gradients=True)
            losses.add(float(result.loss))
        assert len(losses) == 1
        assert server.addresses == [target]
