"""Where settings come from: the command line, then `LOSSD_…` in the environment, then a TOML file."""

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lossd_server.config import ServerConfig

_DEFAULTS = {field.name: field.default for field in fields(ServerConfig)}


def server_option(flag: str, **attributes: Any) -> Callable[[Any], Any]:
    """Returns the click option of one field of `ServerConfig`: its default, and its variable."""
    name = flag.removeprefix("--").replace("-", "_")
    return click.option(
        flag,
        default=_DEFAULTS[name],
        envvar=f"LOSSD_{name.upper()}",
        show_default=True,
        show_envvar=True,
        **attributes,
    )


def read_settings(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Makes the settings of a TOML file the defaults of the command.

    Raises:
        click.BadParameter: It is no TOML, or names a setting that there is none of.
    """
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    if unknown := sorted(settings.keys() - known):
        raise click.BadParameter(f"{path}: unknown settings: {', '.join(unknown)}")
    context.default_map = settings
