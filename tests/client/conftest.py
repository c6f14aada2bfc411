"""A live server and a client of it."""

from collections.abc import Iterator

import pytest

from lossd_client import Client, _lanes
from lossd_server.rpc import Server
from tests.service import custom_modules
from tests.service.support import make_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with make_server(load=custom_modules.ALL) as running:
        yield running


@pytest.fixture(scope="session")
def target(server: Server) -> str:
    return server.addresses[0]


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def small_target() -> Iterator[str]:
    """A server with the smallest message limit there is."""
    with make_server(max_message_bytes=1 << 20) as running:
        yield running.addresses[0]


@pytest.fixture
def rapid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls follow one another closely whatever else the machine does."""
    monkeypatch.setattr(_lanes, "RAPID_SECONDS", 60.0)


@pytest.fixture
def lane_server() -> Iterator[Server]:
    """A server that nobody else talks to, whose device `Held` holds."""
    custom_modules.release.clear()
    with make_server(load=("tests.service.custom_modules:Held",)) as running:
        yield running
        custom_modules.release.set()
