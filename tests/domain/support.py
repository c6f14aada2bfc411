"""What tests of the losses and of the assigner share."""

import shutil
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from lossd_server.kernels import library

COMPILERS = ("cc", "gcc", "clang")

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason=f"none of {COMPILERS} is here"
)


def evaluated(loss, arguments, options):
    """Checks and evaluates, as every caller does."""
    return loss.evaluate(loss.prepare(arguments), options)


@contextmanager
def no_kernels():
    """Makes this a machine without a compiler."""
    with patch.object(library, "_loaded", []), patch.object(library, "_find_or_compile", lambda: None):
        yield


def without_kernels(function):
    """Calls a function as on a machine without a compiler."""
    with no_kernels():
        return function()
