"""A panel, and the parts that its queries are made of."""

from collections.abc import Mapping
from dataclasses import dataclass

SERVERS = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
LOSSD = f'{SERVERS}, grpc_service="lossd.v1.LossService"'
CALLS = f'{LOSSD}, grpc_method!~".*Stream"'
"""Those of one request; a stream is open for as long as its caller likes."""
ERRORS = 'grpc_code=~"INTERNAL|UNKNOWN|DATA_LOSS|UNAVAILABLE|DEADLINE_EXCEEDED"'
SAME = "on (namespace, job, instance)"
OURS = f"and {SAME} lossd_build_info"
"""Behind metrics that every process has: the variables may pick jobs of other kinds too."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: Its title.
        about: What it shows and what to make of it.
        unit: Grafana's name of the unit.
        queries: Expressions by legend.
        kind: `timeseries`, `stat` or `heatmap`.
        width: Of the 24 columns of a row.
        stacked: Whether its series add up to something.
        by_method: Whether there is one for each method that is picked above.
        bounds: From where on a single value is yellow, and red.
    """

    title: str
    about: str
    unit: str
    queries: Mapping[str, str]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    by_method: bool = False
    bounds: tuple[float, float] | None = None


def rate(metric: str, labels: str, by: str) -> str:
    """Returns the query of how fast a counter rises, added up by some labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(share: float, metric: str, labels: str, by: str) -> str:
    """Returns the query of the value that a share of what a histogram counted is below."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels, f'{by}, le')})"


def quantiles(metric: str, by: str = "method", what: str = "") -> dict[str, str]:
    """Returns the queries of a histogram's median and 99th percentile by legend."""
    legend = f"{what}{{{{{by}}}}}"
    return {f"p{round(100 * q)} {legend}": quantile(q, metric, SERVERS, by) for q in (0.5, 0.99)}


def total(metric: str, labels: str = SERVERS) -> str:
    """Returns the query of how fast a counter rises over all that is picked."""
    return f"sum(rate({metric}{{{labels}}}[$__rate_interval]))"
