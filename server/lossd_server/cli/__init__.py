"""The `lossd` command."""

import sys


def main() -> None:
    """Runs the command; says what to install where it lacks something."""
    try:
        from lossd_server.cli.app import app  # noqa: PLC0415  # the thin client comes without click
    except ModuleNotFoundError as error:
        if error.name not in {"click", "rich"}:
            raise
        sys.exit("lossd: the command needs more than the client: pip install 'lossd[cli]'")
    app()
