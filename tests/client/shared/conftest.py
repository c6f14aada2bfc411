"""A server behind a Unix socket, and clients of it."""

import pytest

from lossd_client import (
    Client,
    _storage,
)
from tests.service import custom_modules
from tests.service.support import make_server


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("sockets") / "lossd.sock"
    load = ("tests.service.custom_modules:Held", *custom_modules.ALL)
    with make_server(listen=(f"unix:{path}", "127.0.0.1:0"), load=load) as running:
        yield running


@pytest.fixture
def target(both):
    return both.addresses[0]


@pytest.fixture
def client(target):
    with Client(target, timeout=60) as made:
        yield made


@pytest.fixture
def inline(target):
    with Client(target, timeout=60, shared_memory=False) as made:
        yield made


@pytest.fixture
def tiny(monkeypatch):
    """Sees to it that the smallest tensor is shared."""
    monkeypatch.setattr(_storage, "LEAST_BYTES", 1)


@pytest.fixture
def held():
    """Lets `CustomLoss("Held")` run at last, whatever comes."""
    custom_modules.entered.clear()
    custom_modules.release.clear()
    yield
    custom_modules.release.set()
