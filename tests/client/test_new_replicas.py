"""Clients that balance by name find a replica that came later, since their connections have an age."""

import time

import grpc
import numpy as np
import pytest

from lossd.channel_options import client_options
from lossd_client import Client, FocalLoss
from tests.client.names import names
from tests.service.metrics import value
from tests.service.support import make_server

LOGITS, TARGETS = np.ones((4, 3), np.float32), np.array([0, 1, 2, -1])


def calls(server):
    """How many calls a server has had."""
    return value(server, "grpc_server_started_total", grpc_method="ComputeLoss")


def call_until(client, condition, seconds):
    """Calls until a condition holds, for so many seconds at most; returns whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        client.compute_loss(FocalLoss(), LOGITS, TARGETS)
    return condition()


@pytest.mark.parametrize(("age", "is_found"), [(1.0, True), (0.0, False)])
def test_a_replica_that_came_later_is_found_where_connections_have_an_age(age, is_found):
    with make_server(listen=("127.0.0.2:0",), max_connection_age_seconds=age) as first:
        port = int(first.addresses[0].rpartition(":")[2])
        # gRPC asks for names every 30 s at most, which is long for a test.
        options = [*client_options(), ("grpc.dns_min_time_between_resolutions_ms", 100)]
        with (
            names("127.0.0.2") as server_of_names,
            grpc.insecure_channel(server_of_names.target("lossd.test", port), options) as channel,
            Client(channel=channel) as client,
        ):
            assert call_until(client, lambda: calls(first) > 0, 30)
            with make_server(listen=(f"127.0.0.3:{port}",), max_connection_age_seconds=age) as second:
                server_of_names.ips.append("127.0.0.3")
                assert call_until(client, lambda: calls(second) > 0, 60 if is_found else 4) is is_found
            # The newcomer is gone again, and nothing is lost by that either.
            assert call_until(client, lambda: False, 1) is False
