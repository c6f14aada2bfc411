"""Which work runs on the thread that brings it, and that none of it wakes torch's helpers there."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lossd_server.engine import Batching, CustomLoss, Engine, LossItem, LossJob
from lossd_server.engine.affinity import leaves_torch_asleep
from lossd_server.engine.steps import Load
from lossd_server.kernels import load_library
from lossd_server.losses import CenternessLoss, EvaluationOptions, FCOSLoss, FocalLoss, GIoULoss
from tests.domain.support import needs_a_compiler, no_kernels

pytestmark = needs_a_compiler

SIDE = 200
"""Of a map with cells enough for torch to want helpers: it does from 32,768 numbers on."""


class Sum(nn.Module):
    def forward(self, pred):
        return pred.sum()


def arguments_of(loss, dtype=np.float32):
    maps = {
        name: [np.ones((2, n, SIDE, SIDE), dtype)] for name, n in (("cls", 3), ("reg", 4), ("centerness", 1))
    }
    boxes = np.tile(np.array([0, 0, 8, 8], dtype), (SIDE * SIDE, 1))
    rows = np.full(SIDE * SIDE, 0.5, dtype)
    labels = np.zeros((2, SIDE, SIDE), np.int64)
    return {
        "FocalLoss": {"inputs": maps["cls"][0], "targets": labels},
        "GIoULoss": {"pred_boxes": boxes, "target_boxes": boxes.astype(np.int32), "weights": rows},
        "CenternessLoss": {"pred": rows, "target": rows, "weights": rows},
        "FCOSLoss": {
            **{f"{name}_preds": levels for name, levels in maps.items()},
            "ground_truth": [{"boxes": np.array([[0, 0, 60, 60]], np.float32), "labels": np.array([1])}] * 2,
        },
        "CustomLoss": {"pred": rows},
    }[type(loss).__name__]


def job_of(loss, dtype=np.float32, **options):
    arguments = arguments_of(loss, dtype)
    prepared = arguments if isinstance(loss, CustomLoss) else loss.prepare(arguments)
    item = LossItem(path="items[0]", arguments=prepared, options=EvaluationOptions(**options))
    return LossJob(loss=loss, items=[item])


def stays(job):
    return leaves_torch_asleep(job.loss, Load.of(job.items, Batching()))


OURS = [FocalLoss(), GIoULoss(), CenternessLoss(), FCOSLoss(3, strides=(8,), regress_ranges=((-1, 64),))]
ELSEWHERE = {
    "a gamma that no kernel knows": lambda: job_of(FocalLoss(gamma=1.5)),
    "an FCOS loss with such a gamma": lambda: job_of(
        FCOSLoss(3, focal_gamma=0.5, strides=(8,), regress_ranges=((-1, 64),))
    ),
    "float64": lambda: job_of(GIoULoss(), np.float64),
    "gradients in float64": lambda: job_of(GIoULoss(), gradient_dtype=torch.float64),
    "a loss of every row": lambda: job_of(FocalLoss(reduction="none")),
    "a loss of every box": lambda: job_of(GIoULoss("none")),
    "a loss of the operator's": lambda: job_of(CustomLoss("Sum", Sum())),
}


@pytest.fixture(autouse=True)
def _kernels():
    assert load_library() is not None


TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])


@TYPES
@pytest.mark.parametrize("loss", OURS, ids=lambda loss: type(loss).__name__)
def test_what_the_kernels_do_all_of_stays_where_it_is(loss, dtype):
    job = job_of(loss, dtype, gradients=loss.differentiable)
    assert stays(job)
    with no_kernels():
        assert not stays(job)


@pytest.mark.parametrize("why", ELSEWHERE)
def test_what_may_wake_torch_goes_to_its_thread(why):
    assert not stays(ELSEWHERE[why]())


def thread_count():
    """Threads of this process, but for those that gRPC has since tests before, and makes when it likes."""
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that ends
            names.append((thread / "comm").read_text())
    return sum(not name.startswith(("event_engine", "grpc")) for name in names)


def usual_jobs(dtype):
    return [job_of(loss, dtype, gradients=loss.differentiable) for loss in OURS]


def jobs_with_a_nan(dtype):
    """Jobs that arrays do not do, each with a number that is none in its last prediction."""
    jobs = usual_jobs(dtype)
    for job in jobs:
        value = job.items[0].arguments[job.loss.differentiable[-1]]
        (value[0] if isinstance(value, list) else value).reshape(-1)[-1] = np.nan
    return jobs


def strict_jobs_with_places(dtype):
    """Jobs that arrays do not do, since what may be refused is not written to a caller's memory."""
    jobs = usual_jobs(dtype)
    for job in jobs:
        (item,) = job.items
        places = {}
        for name in job.loss.differentiable:
            value = item.arguments[name]
            places[name] = [np.zeros_like(array) for array in (value if isinstance(value, list) else [value])]
        job.items[:] = [item._replace(outputs=places)]
    return [job._replace(strict=True) for job in jobs]


@TYPES
@pytest.mark.parametrize("made", [usual_jobs, jobs_with_a_nan, strict_jobs_with_places])
def test_no_thread_gets_helpers_of_its_own(made, dtype):
    engine = Engine(torch.device("cpu"))
    jobs = made(dtype)
    with ThreadPoolExecutor(6) as pool:
        ready = threading.Barrier(6)
        list(pool.map(lambda _: ready.wait(), range(6)))
        before = thread_count()
        for _ in range(10):
            list(pool.map(engine.compute, jobs * 3))
        assert thread_count() <= before
    engine.close()
