"""Fuzzes the service in process: any bytes are answered or refused for a reason; not collected by pytest.

    pip install atheris
    python -m tests.fuzz.fuzz_service -max_total_time=600 [folder of inputs to begin with and to add to]

The first byte of an input chooses the method, the others are its request. Coverage of the decoder and of
the checks leads it. It ends with the first input that is a fault of the server, and writes that to a file.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["lossd", "lossd_server.rpc", "lossd_server.checks"]):
    from lossd_server.rpc.forms import Forms
    from lossd_server.rpc.service import LossService

import torch

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.config import ServerConfig
from lossd_server.engine import Engine
from lossd_server.errors import LossdError, Reason
from lossd_server.rpc.caller import Caller
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.stages import Stages
from tests.fuzz.mutations import Mutator, valid_requests

CONFIG = ServerConfig(device="cpu", max_message_bytes=1 << 20)
SERVICE = LossService(Engine(torch.device("cpu")), Metrics(), CONFIG)
METHODS = (
    ("ComputeLoss", pb.ComputeLossRequest, SERVICE.compute_loss),
    ("AssignTargets", pb.AssignTargetsRequest, SERVICE.assign_targets),
)
FORMS = {name: Forms(kind) for name, kind, _ in METHODS}
VALID = valid_requests()


def main() -> None:
    atheris.Setup(sys.argv, _one_input, custom_mutator=_mutate)
    atheris.Fuzz()


def _one_input(data: bytes) -> None:
    if not data:
        return
    name, _, answer = METHODS[data[0] % len(METHODS)]
    try:
        answer(FORMS[name].read(data[1:]), Stages(), Caller())
    except LossdError as error:
        if error.reason is Reason.INTERNAL:
            raise


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Spoils what led somewhere new, or now and then begins with a good request."""
    place = seed % len(METHODS)
    name, kind, _ = METHODS[place]
    if seed % 3 == 0 or not data:
        return (bytes([place]) + Mutator(VALID[name], seed).request())[:max_size]
    known = None
    with contextlib.suppress(Exception):
        known = kind.FromString(data[1:])
    if known is not None and seed % 3 == 1:
        return (data[:1] + Mutator([known], seed).request())[:max_size]
    return atheris.Mutate(data, max_size)


if __name__ == "__main__":
    main()
