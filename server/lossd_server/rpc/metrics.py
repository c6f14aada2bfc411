"""The server's Prometheus metrics. No label has values that a caller can choose."""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import grpc
from prometheus_client import CollectorRegistry, Gauge, Info

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.errors import Reason
from lossd_server.losses import LossOutcome
from lossd_server.rpc.collectors import register_process
from lossd_server.rpc.series import Counter, Histogram, Level, Series, note
from lossd_server.rpc.stages import STAGES
from lossd_server.rpc.status import CODES
from lossd_server.targets import Assignment

SECONDS = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
BYTES = tuple(4.0**power for power in range(4, 15))
ITEMS = tuple(2.0**power for power in range(13))

_SERVICE = pb.DESCRIPTOR.services_by_name["LossService"]
HANDLED_CODES = {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, *CODES.values()}
"""What calls of this service end with."""

_BUDGETS = ("requests", "bytes")

_RPC = ("grpc_type", "grpc_service", "grpc_method")


class State(StrEnum):
    """Where a server is between its start and its end."""

    STARTING = "starting"
    """It listens, but is not warm yet."""
    SERVING = "serving"
    DRAINING = "draining"
    """It refuses new work and finishes what runs."""


class ReloadedFile(StrEnum):
    """What is read anew when it changes."""

    CERTIFICATE = "certificate"
    """Certificate, key and authority of callers."""
    TOKENS = "tokens"


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._methods: dict[str, MethodMetrics] = {}
        self.started = Counter("grpc_server_started", "RPCs started on the server.", _RPC, registry=registry)
        self.handled = Counter(
            "grpc_server_handled",
            "RPCs completed on the server, by status code.",
            (*_RPC, "grpc_code"),
            registry=registry,
        )
        self.received = Counter(
            "grpc_server_msg_received", "Messages received by the server.", _RPC, registry=registry
        )
        self.sent = Counter("grpc_server_msg_sent", "Messages sent by the server.", _RPC, registry=registry)
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Time until an RPC was completed.",
            _RPC,
            buckets=SECONDS,
            registry=registry,
        )
        self.stage = Histogram(
            "lossd_stage_seconds",
            "Time spent in a stage: decode, queue, compute, encode.",
            ("method", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self.items = Histogram(
            "lossd_batch_items", "Items in a request.", ("method",), buckets=ITEMS, registry=registry
        )
        batch_jobs = Histogram(
            "lossd_device_batch_jobs",
            "Requests that the device was given together.",
            buckets=ITEMS[:8],
            registry=registry,
        )
        batch_items = Histogram(
            "lossd_device_batch_items",
            "Items that the device was given together.",
            buckets=ITEMS,
            registry=registry,
        )
        self._batch_jobs, self._batch_items = batch_jobs.labels(), batch_items.labels()
        self.queue_length = Gauge(
            "lossd_queue_length", "Requests that wait for the device.", registry=registry
        )
        self.device_wedged = Gauge(
            "lossd_device_wedged", "1 while the device does not come back.", registry=registry
        )
        self.request_bytes = Histogram(
            "lossd_request_bytes", "Size of a request.", ("method",), buckets=BYTES, registry=registry
        )
        self.response_bytes = Histogram(
            "lossd_response_bytes", "Size of an answer.", ("method",), buckets=BYTES, registry=registry
        )
        self.in_flight = Level("lossd_in_flight", "Requests being served.", ("method",), registry=registry)
        self.in_flight_bytes = Gauge(
            "lossd_in_flight_bytes", "Bytes of the requests that were let in.", registry=registry
        )
        self.budget_used = Gauge(
            "lossd_budget_used_ratio", "Share of a budget that is taken.", ("of",), registry=registry
        )
        self.refusals = Counter(
            "lossd_refusals", "Requests refused, by reason.", ("method", "reason"), registry=registry
        )
        self.positives = Counter(
            "lossd_positives", "Positive rows or locations seen.", ("method",), registry=registry
        )
        self.non_finite = Counter(
            "lossd_non_finite_inputs", "Input tensors that held NaN or infinity.", registry=registry
        )
        self.shared_memory = Gauge(
            "lossd_shared_memory_bytes",
            "Shared memory that callers passed and that is mapped.",
            registry=registry,
        )
        self.kernels = Gauge(
            "lossd_compiled_kernels",
            "1 where compiled kernels evaluate on the device, 0 where slower operations of torch do.",
            registry=registry,
        )
        self._reloads = Counter(
            "lossd_reloads", "Files read anew while serving.", ("file", "outcome"), registry=registry
        )
        self.build = Info("lossd_build", "Version and device.", registry=registry)
        self._state = Gauge(
            "lossd_state", "1 for the state that the server is in.", ("state",), registry=registry
        )
        register_process(registry)
        self.set_state(State.STARTING)
        self._begin_at_zero()

    def count_reload(self, file: ReloadedFile, *, failed: bool) -> None:
        """Counts a file that changed: read anew, or of no use, so that what was read before stays."""
        note((self._reloads.labels(file, "failed" if failed else "ok"), 1))

    def set_state(self, state: State) -> None:
        """Says in which state the server is."""
        for other in State:
            self._state.labels(other).set(other is state)

    def observe_batch(self, jobs: int, items: int) -> None:
        """Observes what the device was given together."""
        note((self._batch_jobs, jobs), (self._batch_items, items))

    def of(self, method: str) -> "MethodMetrics":
        """Returns what is counted of one method."""
        if method not in self._methods:
            self._methods[method] = MethodMetrics(self, method)
        return self._methods[method]

    def _begin_at_zero(self) -> None:
        """Makes every series of this service: what first appears as 1 has not risen, for Prometheus."""
        for file in ReloadedFile:
            for outcome in ("ok", "failed"):
                self._reloads.labels(file, outcome)
        for budget in _BUDGETS:
            self.budget_used.labels(budget)
        for method in _SERVICE.methods:
            kind = "bidi_stream" if method.server_streaming else "unary"
            labels = (kind, _SERVICE.full_name, method.name)
            for metric in (self.started, self.received, self.sent, self.handling):
                metric.labels(*labels)
            for code in HANDLED_CODES:
                self.handled.labels(*labels, code.name)
            if not method.server_streaming:  # a stream's requests count as those of its method
                self.of(method.name)
                for reason in Reason:
                    self.refusals.labels(method.name, reason)


class MethodMetrics:
    """What is counted of the requests of one method: looked up once, which takes longer than counting."""

    def __init__(self, metrics: Metrics, method: str) -> None:
        self._request_bytes = metrics.request_bytes.labels(method)
        self._response_bytes = metrics.response_bytes.labels(method)
        self._in_flight = metrics.in_flight.labels(method)
        self._stages = {stage: metrics.stage.labels(method, stage) for stage in STAGES}
        self._items = metrics.items.labels(method)
        self._positives = metrics.positives.labels(method)
        self._non_finite = metrics.non_finite.labels()

    def begin(self, size: int) -> None:
        """Counts a request of so many bytes as one that is served."""
        note((self._in_flight, 1), (self._request_bytes, size))

    def count_outcomes(self, outcomes: Sequence[LossOutcome]) -> None:
        """Counts the items, positives and non-finite inputs of a batch of evaluations."""
        positives = non_finite = 0
        for outcome in outcomes:
            positives += outcome.positive_count
            non_finite += len(outcome.non_finite)
        note((self._items, len(outcomes)), (self._positives, positives))
        if non_finite:
            note((self._non_finite, non_finite))

    def count_assignments(self, assignments: Sequence[Assignment]) -> None:
        """Counts the items and positives of a batch of assignments."""
        positives = sum(found.positive_count for found in assignments)
        note((self._items, len(assignments)), (self._positives, positives))

    def end(
        self, seconds: Mapping[str, float], size: int | None, also: Iterable[tuple[Series, float]] = ()
    ) -> None:
        """Counts a request as served, however it ended.

        Args:
            seconds: What each stage of it took.
            size: Bytes of its answer; None where it has none.
            also: What else is noted of it.
        """
        values = [(self._stages[stage], spent) for stage, spent in seconds.items()]
        if size is not None:
            values.append((self._response_bytes, size))
        note((self._in_flight, -1), *values, *also)
