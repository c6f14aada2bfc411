"""Shared memory across processes: forks, restarts, and either side killed in the middle."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from lossd_client import Client, FocalLoss, LossdError, UnavailableError
from tests.client.shared.support import Outside, is_shared, memory_files
from tests.client.test_processes import FORK_WARNING, evaluate_when_back
from tests.domain.regions import wait_until

LOGITS = np.random.default_rng(0).standard_normal((1, 5, 200, 100), dtype=np.float32)
LABELS = np.random.default_rng(1).integers(-1, 5, (1, 200, 100))


def evaluate(client):
    return client.compute_loss(FocalLoss(), LOGITS, LABELS, gradients=True)


def shared_loss(client):
    """The loss, and whether its gradient came through shared memory."""
    result = evaluate(client)
    return float(result.loss), is_shared(client, result.gradients["inputs"])


def put_shared_loss(client, results):
    results.put(shared_loss(client))


@pytest.fixture
def outside(tmp_path):
    with Outside(tmp_path) as server:
        yield server


@FORK_WARNING
def test_after_a_fork_both_sides_share_memory_of_their_own(outside):
    with Client(outside.target, timeout=30) as client:
        kept = evaluate(client)
        gradient = kept.gradients["inputs"].copy()
        expected = float(kept.loss), True
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        for _ in range(3):
            child = context.Process(target=put_shared_loss, args=(client, results))
            child.start()
            assert shared_loss(client) == expected
            child.join(60)
            try:
                assert child.exitcode == 0
            finally:
                child.kill()
            assert results.get() == expected
        assert np.array_equal(kept.gradients["inputs"], gradient)


def test_in_a_pool_of_fresh_processes(outside):
    with Client(outside.target, timeout=30) as client:
        expected = shared_loss(client)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
            assert workers.submit(shared_loss, client).result(60) == expected


def test_a_server_that_is_killed_leaves_nothing_and_one_that_comes_back_is_given_all(outside, tmp_path):
    with Client(outside.target, timeout=40) as client:
        array = client.allocate(LOGITS.shape)
        array[:] = LOGITS
        kept = evaluate(client)
        expected = kept.gradients["inputs"].copy()
        assert memory_files(outside.process.pid) > 0
        outside.kill()
        with pytest.raises(UnavailableError):
            evaluate(client)
        assert np.array_equal(kept.gradients["inputs"], expected)
        with Outside(tmp_path):
            evaluate_when_back(client)
            result = client.compute_loss(FocalLoss(), array, LABELS, gradients=True)
            assert np.array_equal(result.gradients["inputs"], expected)
            assert is_shared(client, array)
            assert is_shared(client, kept.gradients["inputs"])
            assert shared_loss(client)[1]
        with pytest.raises(UnavailableError):
            evaluate(client)
        with Outside(tmp_path, max_shared_bytes=0):
            evaluate_when_back(client)
            assert shared_loss(client) == (float(kept.loss), False)


def test_a_client_that_is_killed_leaves_nothing(outside):
    script = f"""
    import time
    from lossd_client import Client
    from tests.client.shared.test_processes import evaluate
    client = Client({outside.target!r})
    kept = [evaluate(client) for _ in range(3)]
    print("ready", flush=True)
    time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    assert memory_files(process.pid) > 0
    assert memory_files(outside.process.pid) > 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    wait_until(lambda: memory_files(outside.process.pid) == 0)
    with Client(outside.target) as client:
        assert shared_loss(client)[1]


def test_clients_that_are_killed_while_they_call_harm_nobody(outside):
    script = f"""
    from lossd_client import Client
    from tests.client.shared.test_processes import evaluate
    client = Client({outside.target!r})
    print("ready", flush=True)
    while True:
        evaluate(client)
    """
    with Client(outside.target) as client:
        expected = shared_loss(client)
        for _ in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout.readline() == "ready\n"
            assert shared_loss(client) == expected
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
            process.stdout.close()
            assert shared_loss(client) == expected
        kept = memory_files(outside.process.pid)
        wait_until(lambda: memory_files(outside.process.pid) <= kept)
        client.close()
    wait_until(lambda: memory_files(outside.process.pid) == 0)
    assert outside.process.poll() is None


def test_a_server_that_is_killed_while_it_is_called(outside, tmp_path):
    with Client(outside.target, timeout=40) as client:
        evaluate(client)
        killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; kill -9 {outside.process.pid}"])
        with pytest.raises(LossdError):
            evaluate_for_ever(client)
        killer.wait(30)
        outside.process.wait(30)
        with Outside(tmp_path):
            evaluate_when_back(client)
            assert shared_loss(client)[1]


def evaluate_for_ever(client):
    while True:
        evaluate(client)


def test_a_socket_that_a_killed_server_left_is_replaced(outside, tmp_path):
    outside.kill()
    assert outside.socket.is_socket()
    with Outside(tmp_path), Client(outside.target) as client:
        assert shared_loss(client)[1]
