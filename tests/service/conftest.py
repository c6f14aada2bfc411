"""A live server for the service tests, spoken to by the raw generated stub."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from lossd.v1 import losses_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.rpc import Server
from tests.service import custom_modules
from tests.service.sharing import REGION_BYTES, Caller, sharing_caller
from tests.service.support import connect, good_loss_request, loss_request, make_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with make_server(load=custom_modules.ALL) as running:
        yield running


@pytest.fixture(scope="session")
def stub(server: Server) -> Iterator[LossServiceStub]:
    with connect(server) as made:
        yield made


@pytest.fixture
def fresh() -> Iterator[Server]:
    """A server that nobody else talks to."""
    with make_server(load=("tests.service.custom_modules:Held",)) as running:
        yield running


@pytest.fixture
def small_server() -> Iterator[Server]:
    """A server that nobody else talks to and that has few streams."""
    with make_server(max_streams=3) as running:
        yield running


@pytest.fixture
def small_stub(small_server: Server) -> Iterator[LossServiceStub]:
    with connect(small_server) as made:
        yield made


@pytest.fixture
def device_held() -> Iterator[threading.Event]:
    """Lets `Held` go at the end, whatever happens; set when it has the device."""
    custom_modules.entered.clear()
    custom_modules.release.clear()
    yield custom_modules.entered
    custom_modules.release.set()


@pytest.fixture
def held() -> Iterator[Callable[[LossServiceStub], Future]]:
    """Makes a call that holds the device until `custom_modules.release` is set."""
    custom_modules.entered.clear()
    custom_modules.release.clear()
    with ThreadPoolExecutor(1) as pool:

        def hold(stub):
            request = loss_request(losses_pb2.CustomLoss(name="Held"), [{"pred": np.ones(2, np.float32)}])
            call = pool.submit(stub.ComputeLoss, request)
            assert custom_modules.entered.wait(30)
            return call

        yield hold
        custom_modules.release.set()


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that listens on a Unix socket and on TCP."""
    path = tmp_path_factory.mktemp("sockets") / "lossd.sock"
    with make_server(
        listen=(f"unix:{path}", "127.0.0.1:0"), load=custom_modules.ALL, max_shared_bytes=2 * REGION_BYTES
    ) as running:
        yield running


@pytest.fixture
def caller(both: Server) -> Iterator[Caller]:
    """A caller that shares memory, after whom good requests are still answered."""
    with sharing_caller(both) as made:
        yield made
        assert len(made.stub.ComputeLoss(good_loss_request()).results) == 1
