"""The caller's trace, for programs that use OpenTelemetry: it is looked for, never imported first."""

import sys


def with_trace(metadata: tuple[tuple[str, str], ...] | None) -> tuple[tuple[str, str], ...] | None:
    """Returns what goes with a call, and the current span's context with it if there is one."""
    if "opentelemetry.trace" not in sys.modules:
        return metadata
    from opentelemetry import propagate  # noqa: PLC0415  # there already

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return (*(metadata or ()), *carrier.items()) or None
