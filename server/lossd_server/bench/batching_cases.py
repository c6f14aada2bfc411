"""The case of many callers at a time: what waits evaluated one by one, and together."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lossd_server.bench.case import Case, CaseSpec, Path, Workbench
from lossd_server.bench.inputs import SHAPES, logits_and_labels
from lossd_server.engine import Asker, Batching, Engine, LossItem, LossJob
from lossd_server.losses import EvaluationOptions, FocalLoss

_CALLERS = (4, 16, 64)
_JOBS_EACH = 8


def batching_cases() -> list[CaseSpec]:
    """Returns the cases of callers that ask one engine at a time."""
    return [
        CaseSpec(
            name=f"batching-{callers}",
            title=f"focal value and gradient by {callers} threads at a time, {_JOBS_EACH} jobs each, "
            f"{list(SHAPES['S'])} a job",
            build=partial(_build, callers=callers),
        )
        for callers in _CALLERS
    ]


def _build(bench: Workbench, *, callers: int) -> Case:
    jobs = [_job() for _ in range(callers)]
    pool = bench.resources.enter_context(ThreadPoolExecutor(callers))
    paths = [
        Path(name=name, call=_calls(bench, jobs, pool, together=together))
        for name, together in (("one by one", False), ("together", True))
    ]
    return Case(paths=tuple(paths), base="one by one")


def _job() -> LossJob:
    logits, labels = logits_and_labels(SHAPES["S"])
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
