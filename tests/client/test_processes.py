"""Clients across processes, and servers that go away and come back."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lossd_client import Client, FCOSAssigner, FocalLoss, InvalidInputError, UnavailableError
from tests.service.support import focal_arrays

ARRAYS = focal_arrays(np.random.default_rng(0), 5)
ARGUMENTS = ARRAYS["inputs"], ARRAYS["targets"]
TRUTH = [{"boxes": [[4.0, 4.0, 60.0, 60.0]], "labels": [1]}]

FORK_WARNING = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def evaluate(client: Client) -> float:
    return float(client.compute_loss(FocalLoss(), *ARGUMENTS).loss)


def refuse(client: Client) -> None:
    client.compute_loss(FocalLoss(), ARGUMENTS[0], np.full(5, 77))


def put_loss(client: Client, results) -> None:
    results.put(evaluate(client))


def test_a_pickled_client_works(client, target):
    expected = evaluate(client)
    copy = pickle.loads(pickle.dumps(Client(target, timeout=12.5)))  # noqa: S301
    assert evaluate(copy) == expected
    copy.close()


def test_in_a_pool_of_fresh_processes(client):
    expected = evaluate(client)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(evaluate, client).result(60) == expected
        with pytest.raises(InvalidInputError) as caught:
            pool.submit(refuse, client).result(60)
        assert caught.value.reason == "LABEL_OUT_OF_RANGE"


@FORK_WARNING
def test_after_a_fork_both_sides_go_on(outside):
    with Client(outside.target, timeout=30) as client:
        expected = evaluate(client)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        for _ in range(3):
            time.sleep(0.2)  # gRPC takes no notice of a fork while a thread of its own still ends a call
            child = context.Process(target=put_loss, args=(client, results))
            child.start()
            assert evaluate(client) == expected
            child.join(60)
            try:
                assert child.exitcode == 0
            finally:
                child.kill()
            assert results.get() == expected
        assert evaluate(client) == expected


class Targets(Dataset):
    """Images whose targets a server assigns, in whichever process that is."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        found = self.client.assign_targets(
            FCOSAssigner(), TRUTH, image_size=(64 + 8 * index, 64), sparse=True
        )
        return torch.tensor([index, len(found.labels)])


@FORK_WARNING
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("used_before", [False, True])
def test_in_the_workers_of_a_data_loader(outside, context, used_before):
    with Client(outside.target, timeout=30) as client:
        if used_before:
            evaluate(client)
        loader = DataLoader(Targets(client), num_workers=2, multiprocessing_context=context, timeout=60)
        rows = [row.tolist() for batch in loader for row in batch]
        assert [index for index, _ in rows] == list(range(6))
        assert all(count > 0 for _, count in rows)
        assert evaluate(client) > 0


def test_from_many_threads(client):
    expected = evaluate(client)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(evaluate, [client] * 40)) == {expected}


SCRIPT = """
import sys, time
from lossd_server.config import ServerConfig
from lossd_server.rpc import Server
server = Server(ServerConfig(listen=(sys.argv[1],), metrics_port=None, device="cpu"))
server.start()
print("port", server.addresses[0].rpartition(":")[2], flush=True)
time.sleep(600)
"""


class Outside:
    """A server in a process of its own, to be killed."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True
        )
        line = next((line for line in self._process.stdout if line.startswith("port ")), "")
        self.port = int(line.removeprefix("port "))
        self.target = f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process.stdout.close()

    def alive(self) -> bool:
        return self._process.poll() is None


@pytest.fixture
def outside():
    server = Outside()
    yield server
    if server.alive():
        server.kill()


def test_a_server_that_dies_is_missed_and_welcomed_back(outside):
    with Client(outside.target, timeout=40) as client:
        expected = evaluate(client)
        outside.kill()
        with pytest.raises(UnavailableError):
            evaluate(client)
        with pytest.raises(UnavailableError):
            evaluate(client)
        again = Outside(outside.port)
        try:
            assert evaluate_when_back(client) == expected
            assert evaluate(client) == expected
        finally:
            again.kill()


def evaluate_when_back(client: Client) -> float:
    """gRPC may still be in the pause before its next attempt to connect, at most two seconds long."""
    for _ in range(4):
        try:
            return evaluate(client)
        except UnavailableError:
            continue
    return evaluate(client)


def test_a_server_that_comes_back_between_two_calls_is_not_missed(outside):
    with Client(outside.target, timeout=40) as client:
        expected = evaluate(client)
        outside.kill()
        again = Outside(outside.port)
        try:
            assert evaluate(client) == expected
        finally:
            again.kill()
