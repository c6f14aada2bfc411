"""What was not answered is asked again, however large it is."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from lossd_client import Client, FocalLoss, UnavailableError
from tests.service.support import make_server

MEGABYTE = 1 << 20


class Proxy:
    """Passes requests on to a server after turning the first ones away."""

    def __init__(self, target, refusals):
        self.refusals = refusals
        self.sizes = []
        self._channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])

    def service(self, call_details):
        method = self._channel.unary_unary(call_details.method)

        def handle(data, call):
            self.sizes.append(len(data))
            if len(self.sizes) <= self.refusals:
                call.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            return method(data)

        return grpc.unary_unary_rpc_method_handler(handle)


@pytest.fixture
def proxied():
    """A function that returns a proxy and its address."""
    servers = []

    def start(refusals):
        target = make_server()
        target.start()
        proxy = Proxy(target.addresses[0], refusals)
        server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
        server.add_generic_rpc_handlers((proxy,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.extend([server, target])
        return proxy, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0)


def logits(megabytes):
    return np.zeros((megabytes * MEGABYTE // 32, 8), np.float32)


@pytest.mark.parametrize("megabytes", [1, 24])
def test_a_large_request_is_asked_again(proxied, megabytes):
    proxy, address = proxied(refusals=2)
    inputs = logits(megabytes)
    with Client(address) as client:
        client._max_message_bytes = 256 * MEGABYTE  # so that its own question is not the one refused
        result = client.compute_loss(FocalLoss(), inputs, np.zeros(len(inputs), np.int64))
    assert result.positive_count == len(inputs)
    assert len(proxy.sizes) == 3
    assert min(proxy.sizes) > megabytes * MEGABYTE


def test_a_server_that_stays_away_is_reported_after_a_few_tries(proxied):
    proxy, address = proxied(refusals=100)
    with Client(address) as client, pytest.raises(UnavailableError, match="not now"):
        client.server_info()
    assert len(proxy.sizes) == 4
