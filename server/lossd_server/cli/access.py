"""The options of commands that call a server: what lets them in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lossd_client import TLS

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_TLS_OPTIONS = (
    click.option("--tls", is_flag=True, help="Connect by TLS, as the next four do too."),
    click.option(
        "--ca", type=_FILE, help="PEM file of the authorities that the server's certificate is from."
    ),
    click.option("--cert", type=_FILE, help="PEM file of a certificate of your own."),
    click.option("--key", type=_FILE, help="PEM file of its key."),
    click.option("--server-name", help="Name that the server's certificate is for, if not TARGET's."),
)
_TOKEN_OPTIONS = (
    click.option("--token-file", type=_FILE, help="File with a bearer token."),
    click.option("--insecure", is_flag=True, help="Send it over a network as plain text."),
)


def tls_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of an encrypted connection."""
    return _with(_TLS_OPTIONS, command)


def access_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of an encrypted connection and of a token."""
    return _with((*_TLS_OPTIONS, *_TOKEN_OPTIONS), command)


def tls_of(options: Mapping[str, Any]) -> "TLS | None":
    """Returns what the options of an encrypted connection say.

    Raises:
        click.UsageError: There is half of a pair.
    """
    files = {name: options[name] for name in ("ca", "cert", "key", "server_name")}
    if not options["tls"] and not any(files.values()):
        return None
    from lossd_client import TLS  # noqa: PLC0415

    try:
        return TLS(**files)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _with(options: tuple[Callable[[Any], Any], ...], command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command
