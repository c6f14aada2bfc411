"""The commands; what each needs is imported when it runs, so that `lossd info` needs no torch."""

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from lossd import __version__
from lossd_server.cli.access import access_options, tls_of, tls_options
from lossd_server.cli.load import load_options
from lossd_server.cli.load import run as run_load
from lossd_server.cli.settings import PermissionBits, read_settings, server_config, server_option
from lossd_server.config import BATCHING
from lossd_server.errors import LossdError

_OPTIONAL = {"torch", "prometheus_client", "structlog", "grpc_health", "grpc_reflection"}


class _Command(click.Command):
    """A command that says what to install instead of failing on an import."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _OPTIONAL:
                raise
            raise click.ClickException(
                f"'lossd {ctx.info_name}' needs the server: pip install 'lossd[server]'"
            ) from error


# Torch's idle helpers spin for milliseconds and keep the kernels' threads, and everyone else, from their
# cores; this is some tens of microseconds. Read once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lossd")
def app() -> None:
    """Object-detection losses, their gradients and FCOS targets, over gRPC."""


@app.command(cls=_Command)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="LOSSD_CONFIG",
    is_eager=True,
    expose_value=False,
    callback=read_settings,
    help="A TOML file of these settings. Options and the environment go first.",
)
@server_option(
    "--listen", multiple=True, help="host:port or unix:/path; repeatable. Port 0 takes a free one."
)
@server_option("--metrics-port", type=int, help="Port of the Prometheus endpoint; -1 serves none.")
@server_option("--metrics-host", help="Address of the Prometheus endpoint.")
@server_option("--device", help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N.")
@server_option("--max-message-bytes", type=int, help="Largest request that is read.")
@server_option("--max-in-flight", type=int, help="Requests in flight at a time; further ones are refused.")
@server_option("--max-in-flight-bytes", type=int, help="Most bytes of requests in flight.")
@server_option("--max-streams", type=int, help="Streams open at a time.")
@server_option("--read-seconds", type=float, help="How long a body may take to come, an answer to go.")
@server_option(
    "--max-shared-bytes",
    type=int,
    help="Most shared memory of one connection, taken beside a unix:/path; 0 shares none.",
)
@server_option("--max-total-shared-bytes", type=int, help="Most shared memory over all connections.")
@server_option(
    "--batching", type=click.Choice(BATCHING), help="Evaluate what waits together; auto: on a GPU."
)
@server_option("--batch-max-items", type=int, help="Most items evaluated in one go.")
@server_option("--batch-max-bytes", type=int, help="Most bytes of their tensors, read and written.")
@server_option("--batch-wait-us", type=int, help="Microseconds that a batch waits for company.")
@server_option(
    "--wedged-seconds",
    type=float,
    help="An evaluation that takes longer turns health to NOT_SERVING; 0: none.",
)
@server_option("--drain-seconds", type=float, help="How long a stopping server waits for what runs.")
@server_option(
    "--max-connection-age-seconds",
    type=float,
    help="How long a connection takes new calls, before its client makes another; 0 for ever.",
)
@server_option("--tls-cert", help="PEM file of the certificate: TLS on every TCP listener.")
@server_option("--tls-key", help="PEM file of its key.")
@server_option("--tls-client-ca", help="PEM file of the authorities whose certificate callers must have.")
@server_option("--tokens", help="TOML file of bearer tokens: callers must have one, within its limits.")
@server_option("--insecure", is_flag=True, help="Let others than this machine in without TLS.")
@server_option(
    "--unix-mode",
    type=PermissionBits(),
    show_default="0600",
    help="Permissions of Unix sockets: who may write may connect.",
)
@server_option("--spread", is_flag=True, help="Run small calls on all cores, not on one that they share.")
@server_option("--tracing", is_flag=True, help="Make OpenTelemetry spans, sent by the OTEL_… variables.")
@server_option("--load", multiple=True, help="[name=]package.module:Class of a custom loss; repeatable.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    envvar="LOSSD_LOG_FORMAT",
    show_default=True,
    show_envvar=True,
    help="How log lines are written.",
)
def serve(log_format: str, **settings: object) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    # gRPC's core writes lines of its own about what `lossd serve` says in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lossd_server.cli.log import configure_logging, say_why_not  # noqa: PLC0415

    configure_logging(log_format)  # and then torch, whose import may warn
    try:
        config = server_config(settings)
    except LossdError as error:
        say_why_not(error, log_format)
        sys.exit(1)
    from lossd_server.cli.serve import run  # noqa: PLC0415

    run(config, log_format)


@app.command(cls=_Command)
@click.option(
    "--coco",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A COCO annotation file to take the scenes from.",
)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Steps of descent."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def demo(coco: Path | None, steps: int, device: str) -> None:
    """Start a server, assign targets, and fit a detector head through it."""
    from lossd_server.cli.demo import run  # noqa: PLC0415

    run(coco=coco, steps=steps, device=device, console=Console(highlight=False))


@app.command(cls=_Command)
@click.argument("target", default="127.0.0.1:50051")
@access_options
def info(target: str, token_file: Path | None, *, insecure: bool, **tls: object) -> None:
    """Say what the server at TARGET is and offers."""
    from lossd_server.cli.info import run  # noqa: PLC0415

    run(target, Console(highlight=False), tls=tls_of(tls), token=token_file, insecure=insecure)


@app.command(cls=_Command)
@click.argument("target", default="127.0.0.1:50051", envvar="LOSSD_HEALTH_TARGET")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True, help="Seconds."
)
@click.option(
    "--service", default="", help="Service to ask for, such as lossd.v1.LossService.  [default: all]"
)
@tls_options
def health(target: str, service: str, timeout: float, **tls: object) -> None:
    """Exit with 0 if the server at TARGET, host:port or unix:/path, is SERVING, else with 1."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lossd_server.cli.health import run  # noqa: PLC0415

    run(target, service=service, timeout=timeout, tls=tls_of(tls))


@app.command(cls=_Command)
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="Fewer rounds, and no large inputs.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here."
)
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Figures of an earlier run to set beside these.",
)
@click.option(
    "--coco",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A COCO annotation file, to assign targets to real objects.",
)
@click.option(
    "--plain-malloc",
    is_flag=True,
    help="Leave malloc of this process as callers have it; else it keeps freed memory, as servers do.",
)
@load_options
def bench(
    names: tuple[str, ...],
    *,
    quick: bool,
    device: str,
    json_path: Path | None,
    compare: Path | None,
    coco: Path | None,
    plain_malloc: bool,
    loaded: bool,
    **load: object,
) -> None:
    """Measure losses, targets and transport side by side; NAMES pick some cases by how they begin.

    With --load, have many callers at a time call a server instead, and say what became of their calls.
    """
    if loaded:
        if names:
            raise click.UsageError(f"--load takes --mix, and no names of cases: {' '.join(names)}")
        run_load({"device": device, **load}, json_path)
        return
    from lossd_server.bench import runner as benchmark  # noqa: PLC0415
    from lossd_server.engine import resolve_device  # noqa: PLC0415

    try:
        benchmark.run(
            names=names,
            quick=quick,
            device=str(resolve_device(device)),
            console=Console(highlight=False),
            json_path=json_path,
            compare=compare,
            coco=coco,
            plain_malloc=plain_malloc,
        )
    except (LossdError, OSError) as error:
        sys.exit(f"lossd: {error}")
