"""What a load came to, and its form as JSON."""

import json
import os
import platform
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from lossd import __version__
from lossd_server.bench.load.crew import CrewFindings
from lossd_server.bench.load.kinds import KINDS
from lossd_server.bench.load.mix import Share
from lossd_server.bench.load.tally import Tally
from lossd_server.bench.load.watch import Footprint

_FORMAT = 1
_DISTRIBUTIONS = ("grpcio", "numpy", "protobuf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latencies:
    """Quantiles of what calls took, seconds; None of no calls."""

    p50: float | None
    p99: float | None
    p999: float | None

    @classmethod
    def of(cls, seconds: "array[float]") -> "Latencies":
        """Returns the quantiles: of 1,000 calls, the 500th, the 990th and the 999th."""
        ordered = sorted(seconds)
        p50, p99, p999 = (_quantile(ordered, share) for share in (0.5, 0.99, 0.999))
        return cls(p50=p50, p99=p99, p999=p999)


@dataclass(frozen=True, kw_only=True, slots=True)
class KindResult:
    """What became of the calls of one kind.

    Attributes:
        kind: Its name.
        title: What was asked for, in words.
        callers: How many called.
        answered: How many calls were answered.
        calls_per_second: The same a second.
        bytes_per_second: Of their requests and answers.
        latencies: What they took, from when they were due.
        refused: How many were refused: the server wants to be asked again later.
        refused_per_second: The same a second.
        refused_latencies: What that took, from when the call was made.
        refusals: How many by reason.
        errors: How many calls failed otherwise, by reason.
        checked: Answers that were compared with the expected one, bit by bit.
        wrong: Those of them that were another.
    """

    kind: str
    title: str
    callers: int
    answered: int
    calls_per_second: float
    bytes_per_second: float
    latencies: Latencies
    refused: int
    refused_per_second: float
    refused_latencies: Latencies
    refusals: Mapping[str, int]
    errors: Mapping[str, int]
    checked: int
    wrong: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of load.

    Attributes:
        name: `load`, or `peak` and `overload`.
        seconds: How long calls were counted.
        offered_per_second: Calls that were due a second; None where the next came with the answer.
        client_cores: Processor time of the callers a second.
        kinds: One result a kind.
        server: What the server's process held; None where it is none of ours.
    """

    name: str
    seconds: float
    offered_per_second: float | None
    client_cores: float
    kinds: Sequence[KindResult]
    server: Footprint | None

    @property
    def calls_per_second(self) -> float:
        """Answered calls of all kinds a second."""
        return sum(kind.calls_per_second for kind in self.kinds)

    @property
    def made_per_second(self) -> float:
        """Calls that came to any end, a second."""
        ends = (kind.answered + kind.refused + sum(kind.errors.values()) for kind in self.kinds)
        return sum(ends) / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What a whole run found.

    Attributes:
        date: When it began, ISO 8601, UTC.
        versions: Of lossd, Python and the libraries.
        cpu_count: Cores that this process may use.
        target: What was called.
        phases: One after the other.
    """

    date: str
    versions: Mapping[str, str]
    cpu_count: int
    target: str
    phases: Sequence[Phase]

    @property
    def goodput_ratio(self) -> float | None:
        """What is answered under overload, as a share of the peak; None without both phases."""
        rates = {phase.name: phase.calls_per_second for phase in self.phases}
        peak = rates.get("peak")
        return rates["overload"] / peak if peak and "overload" in rates else None


def kind_result(share: Share, tally: Tally, seconds: float) -> KindResult:
    """Returns what became of the calls of one kind within some seconds."""
    return KindResult(
        kind=share.kind,
        title=KINDS[share.kind].title,
        callers=share.callers,
        answered=len(tally.answered),
        calls_per_second=len(tally.answered) / seconds,
        bytes_per_second=tally.bytes_moved / seconds,
        latencies=Latencies.of(tally.answered),
        refused=len(tally.refused),
        refused_per_second=len(tally.refused) / seconds,
        refused_latencies=Latencies.of(tally.refused),
        refusals=dict(tally.refusals),
        errors=dict(tally.errors),
        checked=tally.checked,
        wrong=tally.wrong,
    )


def phase(
    name: str,
    shares: Sequence[Share],
    found: CrewFindings,
    *,
    offered: float | None,
    server: Footprint | None,
) -> Phase:
    """Returns what one stretch of load came to."""
    kinds = [kind_result(share, found.tallies.get(share.kind, Tally()), found.seconds) for share in shares]
    return Phase(
        name=name,
        seconds=found.seconds,
        offered_per_second=offered,
        client_cores=found.client_cores,
        kinds=kinds,
        server=server,
    )


def report(target: str, phases: Sequence[Phase], date: datetime) -> LoadReport:
    """Returns all phases with what they ran on."""
    versions = {"lossd": __version__, "python": platform.python_version()}
    return LoadReport(
        date=date.astimezone(UTC).isoformat(timespec="seconds"),
        versions={**versions, **{name: version(name) for name in _DISTRIBUTIONS}},
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        target=target,
        phases=phases,
    )


def to_json(found: LoadReport) -> str:
    """Returns a report as JSON."""
    fields = {"format": _FORMAT, **asdict(found), "goodput_ratio": found.goodput_ratio}
    return json.dumps(fields, indent=2) + "\n"


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None
