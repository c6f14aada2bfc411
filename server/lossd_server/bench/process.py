"""A process of the benchmark's own: it says where it listens, and ends when its input does."""

import subprocess
import sys

from lossd_server.errors import LossdError, Reason

_STOP_SECONDS = 10


def start(module: str, *arguments: str) -> tuple["subprocess.Popen[str]", str]:
    """Starts `main` of a module in a process, and returns it with the first line that it prints.

    Raises:
        LossdError: It ended before.
    """
    script = f"import sys; from {module} import main; main(*sys.argv[1:])"
    process = subprocess.Popen(  # noqa: S603  # this interpreter, a module of ours
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        process.kill()
        process.wait()
        raise LossdError(Reason.INTERNAL, "the benchmark's server did not start")
    return process, line


def listening(line: str) -> None:
    """Prints where this process listens, and waits until its input ends: also when the parent is gone."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def stop(process: "subprocess.Popen[str]") -> None:
    """Ends a process: by closing its input, or by force if it does not listen to that."""
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
