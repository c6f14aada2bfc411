"""Writes the dashboard that the chart and compose hand to Grafana: `python deploy/grafana/generate.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panel import SERVERS, Panel
from panels import ROWS

DASHBOARD = Path(__file__).parents[1] / "helm" / "lossd" / "files" / "dashboard.json"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_HEIGHT = {"stat": 4, "timeseries": 8, "heatmap": 8}


def dashboard() -> dict[str, Any]:
    """Returns the dashboard as Grafana imports it."""
    return {
        "uid": "lossd",
        "title": "lossd",
        "description": "Detection losses and targets over gRPC.",
        "tags": ["lossd", "grpc"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "panels": list(_laid_out()),
    }


def text() -> str:
    """Returns the file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    yield _variable("namespace", "lossd_build_info")
    yield _variable("job", 'lossd_build_info{namespace=~"$namespace"}')
    yield _variable("instance", 'lossd_build_info{namespace=~"$namespace", job=~"$job"}')
    yield _variable("method", f"lossd_in_flight{{{SERVERS}}}")


def _variable(name: str, metric: str) -> dict[str, Any]:
    """Returns a variable of all values that a label has; `.*` also fits where it has none."""
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({metric}, {name})", "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _laid_out() -> Iterator[dict[str, Any]]:
    """Yields rows and panels from left to right and from top to bottom."""
    number, top = 1, 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        number, top, left = number + 1, top + 1, 0
        for panel in panels:
            height = _HEIGHT[panel.kind]
            yield _panel(panel, number, {"x": left, "y": top, "w": panel.width, "h": height})
            number, left = number + 1, left + panel.width
            if left >= _COLUMNS:
                top, left = top + height, 0
        top += height if left else 0


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    made = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _OPTIONS[panel.kind](panel),
        "targets": [_target(panel, *query) for query in zip("ABCD", panel.queries.items(), strict=False)],
    }
    if panel.by_method:
        made |= {"repeat": "method", "repeatDirection": "h", "maxPerRow": 3}
    return made


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit}
    if panel.bounds:
        steps = zip(("green", "yellow", "red"), (None, *panel.bounds), strict=True)
        field["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": color, "value": value} for color, value in steps],
        }
    if panel.kind == "timeseries":
        field["custom"] = {
            "fillOpacity": 20 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return field


def _target(panel: Panel, letter: str, query: tuple[str, str]) -> dict[str, Any]:
    legend, expression = query
    return {
        "refId": letter,
        "datasource": _SOURCE,
        "expr": expression,
        "legendFormat": legend,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        "range": True,
    }


def _stat(panel: Panel) -> dict[str, Any]:
    names = any("{{" in legend for legend in panel.queries)
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value" if panel.bounds else "none",
        "graphMode": "none" if names else "area",
        "textMode": "name" if names else "value",
    }


def _timeseries(_panel: Panel) -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _heatmap(panel: Panel) -> dict[str, Any]:
    return {
        "calculate": False,
        "yAxis": {"unit": panel.unit},
        "color": {
            "mode": "scheme",
            "scheme": "Blues",
            "steps": 64,
            "exponent": 0.5,
            "fill": "blue",
            "reverse": False,
        },
        "cellGap": 1,
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
    }


_OPTIONS = {"stat": _stat, "timeseries": _timeseries, "heatmap": _heatmap}

if __name__ == "__main__":
    DASHBOARD.write_text(text())
