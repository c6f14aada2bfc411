"""What a run found, and its form as JSON."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from lossd import __version__
from lossd_server.engine import describe_device
from lossd_server.errors import InvalidInputError, Reason

_FORMAT = 2
_DISTRIBUTIONS = ("torch", "numpy", "grpcio", "protobuf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What a run ran on.

    Attributes:
        date: When it began, ISO 8601, UTC.
        versions: Of lossd, Python and the libraries.
        cpu_count: Cores that this process may use.
        threads: Threads that torch computes with.
        device: Where losses were evaluated.
        quick: Whether it was cut short.
        tuned_malloc: Whether glibc's thresholds were raised, for all paths alike.
    """

    date: str
    versions: Mapping[str, str]
    cpu_count: int
    threads: int
    device: str
    quick: bool
    tuned_malloc: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PathResult:
    """What one path took.

    Attributes:
        name: Of the path.
        lower: First quartile of the time, seconds.
        median: Its median, seconds.
        upper: Its third quartile, seconds.
        count: How many calls were timed.
        peak_bytes: Memory beyond what was in use before, at the peak.
        value_error: Relative error of the value.
        gradient_error: Relative error of the gradients, all of them as one vector.
        gpu_seconds: Median of what a GPU took, from its first command to its last, without the host.
        first: Median of the time of calls right after other paths, which are not among those above; None
            where all are such.
    """

    name: str
    lower: float
    median: float
    upper: float
    count: int
    peak_bytes: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    gpu_seconds: float | None = None
    first: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """What the paths of a case took.

    Attributes:
        name: Of the case.
        title: What was measured, in words.
        base: Name of the path that ratios are against.
        paths: One result a path.
    """

    name: str
    title: str
    base: str
    paths: tuple[PathResult, ...]

    def path(self, name: str) -> PathResult | None:
        """Returns the result of a path, or None if it was left out."""
        return next((path for path in self.paths if path.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a whole run found."""

    environment: Environment
    cases: tuple[CaseResult, ...]

    def case(self, name: str) -> CaseResult | None:
        """Returns the result of a case, or None if it was not run."""
        return next((case for case in self.cases if case.name == name), None)


def describe_environment(device: torch.device, *, quick: bool, tuned_malloc: bool) -> Environment:
    """Returns what this process runs on."""
    versions = {"lossd": __version__, "python": platform.python_version()}
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={**versions, **{name: version(name) for name in _DISTRIBUTIONS}},
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=describe_device(device),
        quick=quick,
        tuned_malloc=tuned_malloc,
    )


def to_json(report: Report) -> str:
    """Returns a report as JSON."""
    return json.dumps({"format": _FORMAT, **asdict(report)}, indent=2) + "\n"


def from_json(text: str) -> Report:
    """Returns the report that `to_json` wrote.

    Raises:
        InvalidInputError: It is no report, or one of another version.
    """
    try:
        return _report(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            Reason.INVALID_OPTION, f"is no report of `lossd bench`: {error}", field="compare"
        ) from error


def _report(fields: Mapping[str, Any]) -> Report:
    if fields["format"] != _FORMAT:
        raise ValueError(f"format {fields['format']}, want {_FORMAT}")
    return Report(
        environment=Environment(**fields["environment"]),
        cases=tuple(_case(case) for case in fields["cases"]),
    )


def _case(fields: Mapping[str, Any]) -> CaseResult:
    return CaseResult(**{**fields, "paths": tuple(PathResult(**path) for path in fields["paths"])})
