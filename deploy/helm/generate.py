"""Writes what of the chart follows from elsewhere: the table of values, and which settings `config` takes.

Run it after a change of `values.yaml` or of a setting of `lossd serve`: `python deploy/helm/generate.py`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from lossd_server.cli.app import serve

CHART = Path(__file__).parent / "lossd"

DECIDED_BY_THE_CHART = {
    "config", "drain_seconds", "insecure", "listen", "metrics_host", "metrics_port",
    "tls_cert", "tls_client_ca", "tls_key", "tokens", "unix_mode",
}  # fmt: skip
"""Settings that follow from other values, and are refused in `config`."""

_BEGIN, _END = "<!-- values -->\n", "<!-- end of values -->\n"
_TYPES = {click.INT: "integer", click.FLOAT: "number", click.BOOL: "boolean"}


def settings() -> dict[str, Any]:
    """Returns the JSON schema of every setting that `config` takes, by its name."""
    options = {option.name: option for option in serve.params if option.name not in DECIDED_BY_THE_CHART}
    return {name: _schema(option) for name, option in sorted(options.items())}


def schema() -> str:
    """Returns `values.schema.json` with the settings in it."""
    whole = json.loads((CHART / "values.schema.json").read_text())
    whole["properties"]["config"]["properties"] = settings()
    return json.dumps(whole, indent=2) + "\n"


def readme() -> str:
    """Returns the chart's README with the table of values in it."""
    text = (CHART / "README.md").read_text()
    before, rest = text.split(_BEGIN)
    return before + _BEGIN + values_table() + _END + rest.split(_END)[1]


def values_table() -> str:
    """Returns every documented value, its default and its meaning as a table."""
    lines = ["| value | default | meaning |", "|---|---|---|"]
    for path, default, meaning in documented_values():
        lines.append(f"| `{path}` | {_default(default)} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def documented_values() -> Iterator[tuple[str, Any, str]]:
    """Yields path, default and meaning of each value with a `# --` comment, in the order of the file."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if found := re.match(r" *# (?:-- )?(.*)", line):
            comment = [found[1]] if "# -- " in line else [*comment, found[1]] if comment else []
        elif found := re.match(r"( *)(\w+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if comment:
                yield ".".join(path), _at(defaults, path), " ".join(comment)
            comment = []


def _schema(option: click.Parameter) -> dict[str, Any]:
    if isinstance(option.type, click.Choice):
        return {"enum": list(option.type.choices)}
    one = {"type": _TYPES.get(option.type, "string")}
    return {"type": "array", "items": one} if option.multiple else one


def _at(values: Any, path: list[str]) -> Any:
    for key in path:
        values = values[key]
    return values


def _default(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def main() -> None:
    """Writes both files."""
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
