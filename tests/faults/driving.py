"""Loads of `lossd bench --load` against a server that a test has."""

import io

from rich.console import Console

from lossd_server.bench.load.report import LoadReport
from lossd_server.bench.load.runner import LoadSettings, run
from lossd_server.bench.load.watch import Footprint, footprint, watching
from tests.faults.support import Victim


def drive(server: Victim, *, shared: bool = False, **settings) -> tuple[LoadReport, Footprint, str]:
    """Drives a load; returns what became of it, what the server held meanwhile, and the tables."""
    text = io.StringIO()
    target = server.unix_address if shared else server.address
    with watching(server.process.pid) as samples:
        report = run(LoadSettings(target=target, **settings), Console(file=text))
    return report, footprint(samples), text.getvalue()
