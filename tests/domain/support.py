"""What tests of the losses share."""

from unittest.mock import patch

from lossd_server.losses.native import library


def evaluated(loss, arguments, options):
    """Checks and evaluates, as every caller does."""
    return loss.evaluate(loss.prepare(arguments), options)


def without_kernels(function):
    """Calls a function as on a machine without a compiler."""
    with patch.object(library, "_loaded", []):
        return function()
