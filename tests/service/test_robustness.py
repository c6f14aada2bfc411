"""Nothing that a request or an operator's module does may harm the process; each in one of its own."""

import subprocess
import sys
import textwrap

PREPARE = """
import warnings
import numpy as np
from lossd.v1 import losses_pb2
from tests.service.support import connect, good_loss_request, loss_request, make_server
"""


def run(script: str) -> str:
    """Runs a script in a process of its own and returns what it finds; the log goes to stdout as well."""
    code = PREPARE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    return found.removeprefix("found ")


def test_the_first_call_is_answered_where_warnings_are_errors():
    script = """
    with make_server() as server, connect(server) as stub:
        warnings.simplefilter("error")
        print("found answered", len(stub.ComputeLoss(good_loss_request()).results))
    """
    assert run(script) == "answered 1"


def test_a_module_that_writes_to_its_inputs_harms_nobody():
    # One-byte `bytes` are shared by the whole interpreter: writing to a view of them changes them all.
    script = """
    with make_server(load=("tests.service.custom_modules:InPlace",)) as server, connect(server) as stub:
        arrays = {"pred": np.ones(3, np.float32), "flag": np.array(1, np.int8)}
        for _ in range(2):
            stub.ComputeLoss(loss_request(losses_pb2.CustomLoss(name="InPlace"), [arrays]))
        print("found bytes", bytes([1]), bytes(b"x\\x01")[1:])
    """
    assert run(script) == r"bytes b'\x01' b'\x01'"
