"""Where settings come from: the command line, then `LOSSD_…` in the environment, then a TOML file."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lossd_server.config import ServerConfig

NO_METRICS = -1
"""The metrics port that means none."""

_DEFAULTS = {field.name: field.default for field in fields(ServerConfig)}


class PermissionBits(click.ParamType[int]):
    """Permissions of a file as people write them: octal digits."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the bits; a number, such as TOML's `0o660`, is them already."""
        if isinstance(value, int):
            return value
        try:
            return int(str(value), 8)
        except ValueError:
            self.fail(f"{value!r} is no octal number such as 0660", param, ctx)


def server_option(flag: str, **attributes: Any) -> Callable[[Any], Any]:
    """Returns the click option of one field of `ServerConfig`: its default, and its variable."""
    name = flag.removeprefix("--").replace("-", "_")
    common = {"envvar": f"LOSSD_{name.upper()}", "show_default": True, "show_envvar": True}
    return click.option(flag, default=_DEFAULTS[name], **{**common, **attributes})


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


def server_config(settings: Mapping[str, Any]) -> ServerConfig:
    """Returns the configuration that options make.

    Raises:
        InvalidInputError: A setting is out of range.
    """
    port = settings["metrics_port"]
    return ServerConfig(
        **{
            **settings,
            "listen": tuple(settings["listen"]),
            "load": tuple(settings["load"]),
            "metrics_port": None if port == NO_METRICS else port,
        }
    )
