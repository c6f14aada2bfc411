"""Runs cases one by one, says how far it is, and hands out what they came to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lossd_server.bench import memory
from lossd_server.bench.case import CaseSpec, Outcome, Path, Workbench
from lossd_server.bench.cases import select
from lossd_server.bench.report import (
    CaseResult,
    PathResult,
    Report,
    describe_environment,
    from_json,
    to_json,
)
from lossd_server.bench.tables import print_line, print_report, seconds_text
from lossd_server.bench.timing import FULL, QUICK, Effort, Timing, gpu_seconds, measure
from lossd_server.engine import keep_freed_memory, resolve_device
from lossd_server.losses.gpu import load_kernels


def run(
    *,
    names: Sequence[str] = (),
    quick: bool = False,
    device: str = "cpu",
    console: Console,
    json_path: FilePath | None = None,
    compare: FilePath | None = None,
    coco: FilePath | None = None,
    plain_malloc: bool = False,
) -> None:
    """Measures, prints tables, and writes JSON.

    Args:
        names: Which cases, by whole names or beginnings up to a dash; none means all.
        quick: Fewer rounds, and no large sizes.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        console: Where to print; plain lines where it is no terminal.
        json_path: Where to write the report as JSON.
        compare: An earlier report, to be set beside this one.
        coco: A COCO annotation file; without one, cases of real objects are left out.
        plain_malloc: Whether malloc of this process stays as callers have it: else it keeps freed memory, as
            servers have it do, which is the process of a case's server in any case.

    Raises:
        InvalidInputError: There is no case of that name, or the earlier report is none, or the
            annotation file holds too little.
        ConfigurationError: There is no such device.
        OSError: The earlier report cannot be read, or this one not be written.
    """
    place = resolve_device(device)
    specs = select(names, quick=quick, coco=coco is not None, gpu=place.type == "cuda")
    earlier = None if compare is None else from_json(compare.read_text(encoding="utf-8"))
    tuned = not plain_malloc and keep_freed_memory()
    load_kernels(place)
    environment = describe_environment(place, quick=quick, tuned_malloc=tuned)
    cases = []
    with Workbench(place, coco) as bench:
        for index, spec in enumerate(specs):
            with _progress(console, f"{spec.name} ({index + 1} of {len(specs)})"):
                result = run_case(spec, bench, QUICK if quick else FULL)
            print_line(console, _summary(result))
            cases.append(result)
    report = Report(environment=environment, cases=tuple(cases))
    if json_path is not None:
        json_path.write_text(to_json(report), encoding="utf-8")
    console.print()
    print_report(console, report, earlier)


def run_case(spec: CaseSpec, bench: Workbench, effort: Effort) -> CaseResult:
    """Measures the paths of one case: memory and accuracy of each, then the time of all in turn."""
    case = spec.build(bench)
    paths = [path for path in case.paths if _fits(path)]
    exact = None if case.oracle is None else _vectors(case.oracle())
    results: dict[str, tuple[int | None, float | None, float | None]] = {}
    for path in paths:
        peak, outcome = _observe(path, bench)
        vectors = None if outcome is None else _vectors(outcome)
        if exact is None and path.name == case.base:
            exact = vectors
        results[path.name] = peak, *_errors(vectors, exact)
    del exact
    timings = measure({path.name: path.call for path in paths}, effort, bench.device)
    on_gpu: dict[str, float] = {}
    if case.is_local and bench.device.type == "cuda":
        on_gpu = {
            path.name: gpu_seconds(path.gpu_call or path.call, timings[path.name].median, bench.device)
            for path in paths
        }
    return CaseResult(
        name=spec.name,
        title=spec.title,
        base=case.base,
        paths=tuple(
            _path_result(name, *result, timings[name], on_gpu.get(name)) for name, result in results.items()
        ),
    )


def _fits(path: Path) -> bool:
    available = memory.available_bytes()
    return available is None or path.needs_bytes <= available


def _observe(path: Path, bench: Workbench) -> tuple[int | None, Outcome | None]:
    """Takes a path once and returns how much memory that took, and what came out."""
    path.call()  # what the first call alone allocates is not what a call takes
    bench.buffers.let_go()  # nor is what it left behind free
    outcomes: list[Outcome | None] = []
    peak = memory.peak_extra_bytes(lambda: outcomes.append(path.call()), bench.device)
    return peak, outcomes[0]


def _vectors(outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Returns the value and, all in one, the other outputs, in float64 on the host."""
    value, *others = map(_vector, outcome)
    return value, torch.cat(others) if others else value.new_zeros(0)


def _vector(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.detach().cpu().double().flatten()
    return torch.from_numpy(np.array(output, np.float64)).flatten()


def _errors(
    found: tuple[Tensor, Tensor] | None, exact: tuple[Tensor, Tensor] | None
) -> tuple[float | None, float | None]:
    if found is None or exact is None:
        return None, None
    value, others = (_relative_error(*pair) for pair in zip(found, exact, strict=True))
    return value, others if len(exact[1]) else None


def _relative_error(found: Tensor, exact: Tensor) -> float:
    error = float(torch.linalg.vector_norm(found - exact))
    return error / (float(torch.linalg.vector_norm(exact)) or 1.0)


def _path_result(
    name: str,
    peak_bytes: int | None,
    value_error: float | None,
    gradient_error: float | None,
    timing: Timing,
    on_gpu: float | None,
) -> PathResult:
    return PathResult(
        name=name,
        lower=timing.lower,
        median=timing.median,
        upper=timing.upper,
        count=timing.count,
        peak_bytes=peak_bytes,
        value_error=value_error,
        gradient_error=gradient_error,
        gpu_seconds=on_gpu,
        first=timing.first,
    )


@contextmanager
def _progress(console: Console, text: str) -> Iterator[None]:
    """Shows what is being measured, on a terminal alone."""
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _summary(result: CaseResult) -> str:
    return f"{result.name}: " + ", ".join(f"{p.name} {seconds_text(p.median)}" for p in result.paths)
