"""The losses as the client configures them, each beside the local module, and a channel that counts."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

import lossd_client
from lossd_server import losses as local
from tests.service import support

REDUCTIONS = ("mean", "sum", "none")
WEIGHTS = {"cls_weight": 2.0, "reg_weight": 3.0, "centerness_weight": 0.3}
FCOS_ARGUMENTS = lossd_client.FCOSLoss.inputs[:6]
TRUTH_ARGUMENTS = (*FCOS_ARGUMENTS[:3], "ground_truth")


@dataclass(frozen=True)
class Case:
    """A loss of the client's, the same one as a module, and the arguments of both in order."""

    config: Any
    module: local.LossModule
    make: Callable[[np.random.Generator, int], dict[str, Any]]
    names: tuple[str, ...]

    def arguments(self, seed: int = 0, n: int = 6) -> list[Any]:
        arrays = self.make(np.random.default_rng(seed), n)
        return [arrays[name] for name in self.names]


def _simple(name: str, config: Any, module: Any, make: Any, **settings: Any) -> dict[str, Case]:
    return {
        f"{name}-{reduction}": Case(
            config(reduction=reduction, **settings),
            module(reduction=reduction, **settings),
            make,
            config.inputs,
        )
        for reduction in REDUCTIONS
    }


def _fcos(name: str, make: Any, names: tuple[str, ...], **settings: Any) -> dict[str, Case]:
    return {
        f"{name}-{preset or 'default'}": Case(
            lossd_client.FCOSLoss(num_classes=support.CLASSES, preset=preset, **settings),
            local.FCOSLoss(support.CLASSES, preset=preset, **settings),
            make,
            names,
        )
        for preset in (None, "autotimm", "documented")
    }


SIMPLE = {
    **_simple("focal", lossd_client.FocalLoss, local.FocalLoss, support.focal_arrays),
    **_simple(
        "focal-grid",
        lossd_client.FocalLoss,
        local.FocalLoss,
        support.focal_grid_arrays,
        alpha=None,
        gamma=1.5,
    ),
    **_simple("giou", lossd_client.GIoULoss, local.GIoULoss, support.giou_arrays),
    **_simple("centerness", lossd_client.CenternessLoss, local.CenternessLoss, support.centerness_arrays),
}
FCOS = {
    **_fcos("fcos-dense", support.fcos_dense_arrays, FCOS_ARGUMENTS, **WEIGHTS),
    **_fcos("fcos-truth", support.fcos_truth_arrays, TRUTH_ARGUMENTS, **WEIGHTS),
}


class _Count(grpc.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.calls[details.method.rpartition("/")[2]] += 1
        return continuation(details, request)


@contextmanager
def counting_client(target: str) -> Iterator[tuple[lossd_client.Client, Counter[str]]]:
    """A client, and how often it called each method."""
    count = _Count()
    with grpc.insecure_channel(target) as channel:
        yield lossd_client.Client(channel=grpc.intercept_channel(channel, count)), count.calls


def same_bits(array: np.ndarray, expected: np.ndarray) -> bool:
    return (array.dtype, array.shape) == (expected.dtype, expected.shape) and (
        array.tobytes() == expected.tobytes()
    )
