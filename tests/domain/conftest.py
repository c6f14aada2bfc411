"""Fixtures of the domain tests."""

import pytest

from lossd_server.kernels import load_library
from tests.domain.support import needs_a_compiler, no_kernels


@pytest.fixture(scope="module", params=[pytest.param("C", marks=needs_a_compiler), "numpy"])
def painter(request):
    """Runs every test of a module with the compiled painter of targets and without."""
    if request.param == "C":
        assert load_library() is not None
        yield
    else:
        with no_kernels():
            yield
