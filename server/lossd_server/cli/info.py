"""`lossd info`: what a server is and offers."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from lossd_client import Client, LossdError, ServerInfo


def run(target: str, console: Console, **access: Any) -> None:
    """Prints what the server at a target says of itself; exits with 1 when none answers.

    Args:
        target: Where it listens.
        console: Where to print.
        **access: What lets a `Client` in: `tls`, `token`, `insecure`.
    """
    try:
        with Client(target, timeout=10.0, **access) as client:
            info = client.server_info()
    except (LossdError, ValueError) as error:
        sys.exit(f"lossd: {target}: {error}")
    custom = [f"{name}({', '.join(inputs)})" for name, inputs in info.custom_losses.items()]
    table = Table.grid(padding=(0, 2))
    rows = {
        "version": info.version,
        "devices": ", ".join(info.devices),
        "losses": ", ".join(info.losses),
        "custom losses": ", ".join(custom) or "none loaded",
        "loss presets": ", ".join(info.loss_presets),
        "assigner presets": ", ".join(info.assigner_presets),
        "largest message": f"{info.max_message_bytes:,} bytes",
        "streams at a time": str(info.max_stream_count),
        "shared memory": _shared_memory(info),
        "up for": f"{info.uptime_seconds:,.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _shared_memory(info: ServerInfo) -> str:
    if not info.shared_memory_socket:
        return "none here"
    return f"{info.max_shared_bytes:,} bytes{', of its GPU too' if info.shared_gpu else ''}"
