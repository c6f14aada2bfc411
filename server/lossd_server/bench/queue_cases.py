"""The cases of many callers of one engine: whose turn it is, and what is evaluated together."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lossd_server.bench.case import Case, CaseSpec, Path, Workbench
from lossd_server.bench.inputs import SHAPES, logits_and_labels
from lossd_server.engine import Asker, Batching, Engine, LossItem, LossJob
from lossd_server.losses import EvaluationOptions, FocalLoss

_CALLERS = (4, 16, 64)
_JOBS_EACH = 8
_SMALL_JOBS = 20
_LARGE_CALLERS = 3
_LARGE = "large"


def queue_cases() -> list[CaseSpec]:
    """Returns the cases of callers that ask one engine at a time."""
    return [
        CaseSpec(
            name=f"batching-{callers}",
            title=f"focal value and gradient by {callers} threads at a time, {_JOBS_EACH} jobs each, "
            f"{list(SHAPES['S'])} a job",
            build=partial(_build_batching, callers=callers),
        )
        for callers in _CALLERS
    ] + [
        CaseSpec(
            name="queue-beside",
            title=f"{_SMALL_JOBS} times {list(SHAPES['S'])}, beside {_LARGE_CALLERS} threads that always ask "
            f"for {list(SHAPES['L'])}",
            build=_build_beside,
            large=True,
        )
    ]


def _build_batching(bench: Workbench, *, callers: int) -> Case:
    jobs = [_job("S") for _ in range(callers)]
    pool = bench.resources.enter_context(ThreadPoolExecutor(callers))
    paths = [
        Path(name=name, call=_calls(bench, jobs, pool, together=together))
        for name, together in (("one by one", False), ("together", True))
    ]
    return Case(paths=tuple(paths), base="one by one")


def _job(size: str) -> LossJob:
    logits, labels = logits_and_labels(SHAPES[size])
    loss = FocalLoss()
    arguments = loss.prepare({"inputs": logits.numpy(), "targets": labels.numpy()})
    options = EvaluationOptions(gradients=loss.differentiable)
    return LossJob(loss=loss, items=[LossItem(path="", arguments=arguments, options=options)])


def _calls(
    bench: Workbench, jobs: Sequence[LossJob], pool: ThreadPoolExecutor, *, together: bool
) -> Callable[[], None]:
    """Returns a call that has all threads ask their jobs, each the next when it has the last."""
    engine = Engine(bench.device, batching=Batching(together=together))
    bench.resources.callback(engine.close)

    def ask(caller: int) -> None:
        for _ in range(_JOBS_EACH):
            engine.compute(jobs[caller], Asker(flow=caller))

    def call() -> None:
        list(pool.map(ask, range(len(jobs))))

    return call


def _build_beside(bench: Workbench) -> Case:
    engine = Engine(bench.device)
    bench.resources.callback(engine.close)
    pool = bench.resources.enter_context(ThreadPoolExecutor(_LARGE_CALLERS))
    small, large = _job("S"), _job("L")

    def call(flow: str) -> None:
        """Asks as one flow, and the large ones as another, or as the same."""
        is_over = threading.Event()
        asking = [pool.submit(_saturate, engine, large, is_over) for _ in range(_LARGE_CALLERS)]
        while engine.waiting_count < _LARGE_CALLERS - 1:
            time.sleep(0.001)
        for _ in range(_SMALL_JOBS):
            engine.compute(small, Asker(flow=flow))
        is_over.set()
        for future in asking:
            future.result()

    names = {"one connection": _LARGE, "another": "small"}
    paths = [Path(name=name, call=partial(call, flow)) for name, flow in names.items()]
    return Case(paths=tuple(paths), base="one connection")


def _saturate(engine: Engine, job: LossJob, is_over: threading.Event) -> None:
    while not is_over.is_set():
        engine.compute(job, Asker(flow=_LARGE))
