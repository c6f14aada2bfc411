"""`lossd bench`: what the losses, the assigner and the transports take, side by side in one run."""

from lossd_server.bench.runner import run

__all__ = ["run"]
