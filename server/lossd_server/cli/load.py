"""`lossd bench --load`: its options, and how they become settings."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lossd_server.errors import LossdError

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--load", "loaded", is_flag=True, help="Drive a load instead, by the options below."),
    click.option(
        "--mix", default="assign:8,focal-s:4,focal-m:1", show_default=True, help="Load: kinds and callers."
    ),
    click.option(
        "--concurrency",
        type=click.IntRange(1, 10_000),
        help="Load: callers in all, shared out by the mix.",
    ),
    click.option(
        "--seconds",
        type=click.FloatRange(0.5, 86_400),
        default=10.0,
        show_default=True,
        help="Load: how long.",
    ),
    click.option(
        "--rate",
        type=click.FloatRange(0.1, 1e6),
        help="Load: calls a second, each due at its time. Without, a caller calls when it was answered.",
    ),
    click.option(
        "--overload",
        type=click.FloatRange(1, 100),
        help="Load: then offer so many times what was answered, and compare.",
    ),
    click.option(
        "--target",
        help="Load: a server that runs. Without, one is started, with its LOSSD_….",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(0.01, 3600),
        default=60.0,
        show_default=True,
        help="Load: seconds after which a caller gives a call up.",
    ),
)


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a load to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run(options: Mapping[str, Any], json_path: Path | None) -> None:
    """Drives a load; exits with 1, and one line that says why, where that cannot be."""
    from lossd_server.bench.load.runner import LoadSettings  # noqa: PLC0415
    from lossd_server.bench.load.runner import run as drive  # noqa: PLC0415

    known = {field.name for field in fields(LoadSettings)}
    settings = LoadSettings(**{name: value for name, value in options.items() if name in known})
    try:
        drive(settings, Console(highlight=False), json_path)
    except (LossdError, OSError) as error:
        sys.exit(f"lossd: {error}")
