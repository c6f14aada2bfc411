"""The server: its listeners, health, reflection and metrics, from start to drain."""

from functools import partial
from typing import Any, Self

import grpc
import prometheus_client
import structlog
import torch

from lossd import __version__
from lossd.channel_options import server_options
from lossd_server.config import BATCHING, ServerConfig
from lossd_server.engine import (
    Admission,
    Batching,
    Engine,
    Home,
    describe_device,
    device_memory,
    has_kernels,
    load_custom_losses,
    resolve_device,
)
from lossd_server.errors import ConfigurationError, Reason
from lossd_server.rpc.auth import AuthInterceptor
from lossd_server.rpc.collectors import register_device
from lossd_server.rpc.door import Door
from lossd_server.rpc.handlers import SERVICE_NAME, Handlers
from lossd_server.rpc.interceptor import Intercepted, MetricsInterceptor
from lossd_server.rpc.listeners import listen
from lossd_server.rpc.metrics import Metrics, State
from lossd_server.rpc.refusals import Refusals
from lossd_server.rpc.refusing import RefusingHandlers
from lossd_server.rpc.service import LossService
from lossd_server.rpc.standard import StandardServices
from lossd_server.rpc.threads import Threads
from lossd_server.rpc.tls import Certificates
from lossd_server.rpc.tokens import Tokens
from lossd_server.rpc.tracing_setup import make_tracing
from lossd_server.shared_memory import RegionListener, Regions

_log = structlog.get_logger()

_REFUSING_THREADS = 8
"""Beside those of requests that were let in: they judge those that come."""

_FLUSH_SECONDS = 0.5
"""How long connections may take to carry the last answers."""

_CLOSE_SECONDS = 5
"""How long gRPC may take to close connections that carry nothing any more."""


class Server:
    """A lossd server in this process.

    Use it as a context manager, or call `start` and `stop`.

    Attributes:
        addresses: What it listens on, with the ports that were taken; known after `start`.
        metrics_port: Port of the Prometheus endpoint, or None; known after `start`.

    Raises:
        ConfigurationError: There is no such device, or a custom loss or file cannot be loaded.
    """

    def __init__(self, config: ServerConfig | None = None) -> None:
        self._config = config or ServerConfig()
        self.addresses: list[str] = []
        self.metrics_port: int | None = None
        self._metrics = Metrics()
        self._credentials = (
            Certificates(self._config, self._metrics).credentials() if self._config.tls_cert else None
        )
        self._home = Home() if self._config.spread else Home.of_this_process()
        self._engine = Engine(
            resolve_device(self._config.device),
            load_custom_losses(self._config.load),
            _batching(self._config),
            self._metrics.observe_batch,
            self._home,
        )
        threads = self._config.max_in_flight + 2 * self._config.max_streams + _REFUSING_THREADS
        self._threads = Threads(threads, "lossd-rpc", self._home.settle)
        self._sharing = _sharing(self._config, self._engine.device)
        self._tracing = make_tracing(SERVICE_NAME) if self._config.tracing else None
        self._refusals = Refusals(self._metrics, mark=self._tracing.mark_refusal if self._tracing else None)
        self._refusing = RefusingHandlers(self._refusals)
        self._auth = self._authentication()
        service = LossService(self._engine, self._metrics, self._config, self._sharing)
        self._admission = Admission(
            max_requests=self._config.max_in_flight, max_bytes=self._config.max_in_flight_bytes
        )
        self._door = Door(
            self._admission,
            read_seconds=self._config.read_seconds,
            max_message_bytes=self._config.max_message_bytes,
            buffers=self._engine.buffers,
            home=self._home,
        )
        self._handlers = Handlers(
            service,
            self._metrics,
            self._refusals,
            self._admission,
            self._door,
            self._home,
            max_streams=self._config.max_streams,
            stages=self._tracing.stages if self._tracing else None,
        )
        self._standard = StandardServices(
            (SERVICE_NAME,), self._refusals, self._config.read_seconds, self._home
        )
        self._grpc = self._assemble()
        self._metrics_server: Any = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, warms up, and only then reports SERVING.

        Raises:
            ConfigurationError: An address or the metrics port cannot be listened on.
        """
        self._standard.set_health(serving=False)
        try:
            self.addresses = listen(self._grpc, self._config, self._credentials)
            if self._sharing is not None:
                self._sharing.start()
            self._serve_metrics()
        except ConfigurationError:
            self._shut_down(grace=0)
            raise
        with self._home.of_new_threads():
            self._grpc.start()
        self._home.watch()
        self._engine.warm_up()
        self._standard.set_health(serving=True)
        self._metrics.set_state(State.SERVING)
        self._engine.watch(self._config.wedged_seconds, self._on_wedged)
        _log.info(
            "serving",
            addresses=self.addresses,
            metrics_port=self.metrics_port,
            device=describe_device(self._engine.device),
            version=__version__,
        )

    def stop(self, grace: float | None = None) -> None:
        """Reports NOT_SERVING, refuses new work, and waits for what runs, `grace` seconds at most.

        Args:
            grace: Seconds; None means the configured `drain_seconds`.
        """
        grace = self._config.drain_seconds if grace is None else grace
        self._standard.drain()  # whatever the device does from now on
        self._metrics.set_state(State.DRAINING)
        self._admission.drain()
        self._engine.drain()
        self._handlers.drain(grace)
        drained = self._shut_down(grace)
        _log.info("stopped", drained=drained)

    def _shut_down(self, grace: float) -> bool:
        """Stops everything that was started; returns whether every request was answered."""
        stopped = self._grpc.stop(grace)  # refuses new calls at once
        answered = self._admission.wait_until_answered(grace)
        # The last answers may still be on their way. What stays open then has nothing to say: watchers
        # of health.
        if not stopped.wait(_FLUSH_SECONDS):
            self._grpc.stop(None)
            stopped.wait(_CLOSE_SECONDS)
        self._engine.close()
        self._home.close()
        self._handlers.close()
        self._refusing.close()
        self._door.close()
        self._standard.close()
        self._refusals.close()
        if self._tracing is not None:
            self._tracing.close()
        if self._sharing is not None:
            self._sharing.stop()
        self._threads.shutdown()
        if self._metrics_server is not None:
            server, thread = self._metrics_server
            server.shutdown()
            server.server_close()
            thread.join()
            self._metrics_server = None
        return answered

    def _authentication(self) -> list[grpc.ServerInterceptor]:
        """Returns what asks for tokens, if anything does."""
        if self._config.tokens is None:
            return []
        return [AuthInterceptor(Tokens(self._config.tokens, self._metrics), self._refusing)]

    def _traced(self) -> list[grpc.ServerInterceptor]:
        """Returns what makes spans, if anything does."""
        return [self._tracing.interceptor()] if self._tracing else []

    def _assemble(self) -> grpc.Server:
        config = self._config
        server = grpc.server(
            self._threads,  # type: ignore[arg-type]  # which can all that is asked of it
            options=server_options(
                config.max_message_bytes,
                max_connection_age_seconds=config.max_connection_age_seconds,
                max_calls=config.max_in_flight // 2,
            ),
        )
        interceptors = [*self._traced(), MetricsInterceptor(self._metrics), *self._auth]
        handlers = self._handlers.generic_handler(), *self._standard.generic_handlers()
        server.add_generic_rpc_handlers([Intercepted(each, interceptors) for each in handlers])
        if self._sharing is not None:
            self._metrics.shared_memory.set_function(partial(getattr, self._sharing.regions, "held_bytes"))
        self._describe_budgets()
        self._describe_engine()
        return server

    def _describe_budgets(self) -> None:
        metrics, admission, config = self._metrics, self._admission, self._config
        metrics.in_flight_bytes.set_function(lambda: admission.bytes)
        used = metrics.budget_used.labels
        used("requests").set_function(lambda: admission.requests / config.max_in_flight)
        used("bytes").set_function(lambda: admission.bytes / config.max_in_flight_bytes)

    def _describe_engine(self) -> None:
        device = self._engine.device
        self._metrics.build.info({"version": __version__, "device": describe_device(device)})
        self._metrics.queue_length.set_function(lambda: self._engine.waiting_count)
        self._metrics.device_wedged.set_function(lambda: self._engine.is_wedged)
        self._metrics.kernels.set_function(partial(has_kernels, device))
        register_device(self._metrics.registry, partial(device_memory, device))

    def _serve_metrics(self) -> None:
        port, host = self._config.metrics_port, self._config.metrics_host
        if port is None:
            return
        try:
            self._metrics_server = prometheus_client.start_http_server(
                port, host, registry=self._metrics.registry
            )
        except OSError as error:
            raise ConfigurationError(
                Reason.INVALID_OPTION,
                f"cannot listen on {host}:{port}: {error.strerror}",
                field="metrics_port",
                port=port,
            ) from error
        self.metrics_port = self._metrics_server[0].server_port

    def _on_wedged(self, is_wedged: bool) -> None:  # noqa: FBT001  # the one thing that it is told
        self._standard.set_health(serving=not is_wedged)


def _batching(config: ServerConfig) -> Batching:
    return Batching(
        together=BATCHING[config.batching],
        max_items=config.batch_max_items,
        max_bytes=config.batch_max_bytes,
        wait_seconds=config.batch_wait_us * 1e-6,
    )


def _sharing(config: ServerConfig, device: torch.device) -> RegionListener | None:
    """Returns what takes shared memory, if anything does."""
    if config.shared_memory_path is None:
        return None
    regions = Regions(
        max_bytes=config.max_shared_bytes,
        max_total_bytes=config.max_total_shared_bytes,
        gpu=device.index if device.type == "cuda" else None,
    )
    return RegionListener(config.shared_memory_path, regions, config.unix_mode)
