"""A server of its own for each file of tests."""

import pytest

from tests.faults.support import victim


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with victim(tmp_path_factory.mktemp("victim")) as running:
        yield running
