"""What the table of gRPC options comes to on a channel and on a server."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from lossd.channel_options import client_options, server_options
from lossd_client import Client


@pytest.mark.parametrize("options", [client_options(), server_options(1 << 20)], ids=["client", "server"])
def test_each_option_is_set_once(options):
    assert len({name for name, _ in options}) == len(options)


def test_the_operators_limit_is_the_servers_alone():
    name = "grpc.max_receive_message_length"
    assert (dict(server_options(1 << 20))[name], dict(client_options())[name]) == (1 << 20, -1)


def test_the_table_needs_no_torch_and_no_server():
    code = "import lossd.channel_options, sys; assert not {'torch', 'lossd_server'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_client_has_a_connection_of_its_own():
    peers = []

    class Peers(grpc.GenericRpcHandler):
        def service(self, call_details):
            return grpc.unary_unary_rpc_method_handler(lambda _data, call: peers.append(call.peer()) or b"")

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Peers(),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with Client(target) as one, Client(target) as other:
        for client in (one, other, one):
            client.server_info()
    server.stop(0).wait()
    assert peers[0] == peers[2] != peers[1]
