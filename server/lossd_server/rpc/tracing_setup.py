"""Where spans go: by the standard `OTEL_…` variables, or to whatever the program around has set up."""

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lossd import __version__
from lossd_server.errors import ConfigurationError, Reason

if TYPE_CHECKING:
    from lossd_server.rpc.tracing import Tracing

_CLOSE_SECONDS = 3
"""How long the last spans may take; by itself the exporter goes on trying for a minute."""


def make_tracing(service_name: str) -> "Tracing":
    """Returns what makes spans.

    Args:
        service_name: Full name of the service whose calls have any.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415  # an extra, and of no use where tracing is off
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            Reason.INVALID_OPTION, "needs OpenTelemetry: pip install 'lossd[otel]'", field="tracing"
        ) from error
    from lossd_server.rpc.tracing import Tracing  # noqa: PLC0415

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):  # of the program around, which closes it too
        return Tracing(provider.get_tracer("lossd", __version__), service_name, close=lambda: None)
    own = TracerProvider(resource=Resource.create(_about()), shutdown_on_exit=False)
    own.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(own.get_tracer("lossd", __version__), service_name, close=partial(_close, own.shutdown))


def _close(shut_down: Callable[[], None]) -> None:
    """Sends what is left; a collector that is not there holds up the end for seconds at most."""
    closing = threading.Thread(target=shut_down, name="lossd-spans", daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)


def _about() -> dict[str, str]:
    """Returns what spans say of this service; what the environment says goes first."""
    about = {"service.version": __version__}
    if "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        return about
    return about | {"service.name": "lossd"}
