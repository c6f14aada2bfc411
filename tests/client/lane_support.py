"""What tests of lanes share: small calls, and what a server says of them."""

from typing import Any

import numpy as np

from lossd_client import FCOSAssigner, FocalLoss
from lossd_client import _lanes as lanes
from lossd_server.rpc import Server
from tests.service.metrics import value
from tests.service.support import focal_arrays

PRED = {"pred": np.ones(2, np.float32)}
TRUTH = [{"boxes": [[4.0, 4.0, 60.0, 60.0]], "labels": [1]}]
ENOUGH = lanes.RAPID_CALLS + 4
"""Rapid calls, of which the last go on a lane."""


def arguments(seed: int = 0, n: int = 5) -> tuple[Any, Any]:
    arrays = focal_arrays(np.random.default_rng(seed), n)
    return arrays["inputs"], arrays["targets"]


def evaluate(twin: Any, seed: int = 0, **settings: Any) -> Any:
    """What comes of a small evaluation."""
    return twin.call("compute_loss", FocalLoss(), *arguments(seed), gradients=True, **settings)


def assign(twin: Any) -> Any:
    return twin.call("assign_targets", FCOSAssigner(), TRUTH, image_size=(64, 64), sparse=True)


def open_lane(twin: Any) -> None:
    """Has a client open a lane."""
    for _ in range(ENOUGH):
        evaluate(twin)


def opened(server: Server, method: str = "ComputeLoss") -> float:
    """How many lanes of a method were asked for."""
    return value(server, "grpc_server_started_total", grpc_method=f"{method}Stream")


def in_use(server: Server) -> int:
    return server._handlers._lanes.used
