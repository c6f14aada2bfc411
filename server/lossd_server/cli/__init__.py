"""The `lossd` command."""

import os
import signal
import sys


def main() -> None:
    """Runs the command; says what to install where it lacks something."""
    if os.getpid() == 1:  # of a container, it is ended by no signal that it does not handle itself
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        import click  # noqa: PLC0415  # the thin client comes without it

        from lossd_server.cli.app import app  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name not in {"click", "rich"}:
            raise
        sys.exit("lossd: the command needs more than the client: pip install 'lossd[cli]'")
    try:
        sys.exit(app(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:  # click itself says it in four lines
        sys.stderr.write(f"lossd: {error.format_message()}\n")
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit("lossd: aborted")
