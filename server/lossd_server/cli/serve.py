"""`lossd serve`: a server in the foreground, from its settings to its last call."""

import gc
import os
import sys
import threading

from prometheus_client import disable_created_metrics

from lossd_server.cli.log import say_why_not
from lossd_server.cli.signals import on_every_end
from lossd_server.config import ServerConfig
from lossd_server.engine import keep_freed_memory, use_granted_cores
from lossd_server.errors import LossdError
from lossd_server.rpc import Server


def run(config: ServerConfig, log_format: str) -> None:
    """Serves until SIGTERM or SIGINT; a second signal ends the process at once.

    Exits with 1, and one line that says why, where the configuration cannot be served.
    """
    keep_freed_memory()
    use_granted_cores()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # half as many series again, of no use
    sys.path.insert(0, "")  # `--load` finds modules in the working directory, as `python -m` does
    stop = threading.Event()
    on_every_end(lambda: os._exit(1) if stop.is_set() else stop.set())
    try:
        server = Server(config)
        server.start()
    except LossdError as error:
        say_why_not(error, log_format)
        sys.exit(1)
    # A full collection looks through all that torch is made of, and stops every call for some 50 to 100 ms.
    gc.collect()
    gc.freeze()
    stop.wait()
    server.stop()
    # Work that outlasted the drain runs in threads that the interpreter would wait for.
    sys.stderr.flush()
    os._exit(0)
