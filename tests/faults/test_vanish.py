"""Clients that are killed in the middle of it: the server lets go of everything that was theirs."""

import subprocess
import sys
import time

from tests.faults.support import LONG, eventually

KINDS = ("in_a_request", "on_a_stream", "with_shared_memory", "with_many_calls")
MEBIBYTE = 1 << 20


def vanish(server, rounds):
    for number in range(rounds):
        clients = [start(server, kind) for kind in KINDS]
        try:
            for client in clients:
                assert client.stdout.readline() == "ready\n"
            assert server.held().regions > 0
            time.sleep(0.05 * (1 + number % 5))  # at another moment each time
        finally:
            for client in clients:
                client.kill()  # SIGKILL: nothing of theirs says goodbye
                client.wait()
                client.stdout.close()


def start(server, kind):
    address = server.unix_address if kind == "with_shared_memory" else server.address
    command = [sys.executable, "-m", "tests.faults.vanishing", kind, address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_killed_clients_held_is_let_go(server):
    vanish(server, 2)  # its buffers and the threads of its pools are there then
    assert eventually(lambda: server.held().regions == 0)
    time.sleep(2)
    before = server.held()
    vanish(server, 20 if LONG else 3)
    for name, slack in (("regions", 0), ("descriptors", 4), ("threads", 8), ("rss", 64 * MEBIBYTE)):
        allowed = getattr(before, name) + slack
        assert eventually(lambda name=name, allowed=allowed: getattr(server.held(), name) <= allowed), (
            f"{name}: {before} before, {server.held()} after"
        )
    server.assert_serves()
