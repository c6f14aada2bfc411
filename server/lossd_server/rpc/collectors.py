"""Metrics that are read when Prometheus asks: what the process and its device have and use."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lossd_server.engine import granted_memory


def register_process(registry: CollectorRegistry) -> None:
    """Adds what the process uses, as every Prometheus client names it, and how much memory it may."""
    ProcessCollector(registry=registry)
    registry.register(_MemoryLimit())


def register_device(registry: CollectorRegistry, memory: Callable[[], Mapping[str, int]]) -> None:
    """Adds the memory of the device, as far as `memory` says something."""
    registry.register(_DeviceMemory(memory))


class _MemoryLimit(Collector):
    """Absent where the control group sets no limit: 0 would be one, and all alerts would fire."""

    def collect(self) -> Iterator[Metric]:
        limit = granted_memory()
        if limit is not None:
            yield GaugeMetricFamily(
                "lossd_memory_limit_bytes", "Memory that the control group grants this process.", limit
            )


class _DeviceMemory(Collector):
    """Absent on the CPU."""

    def __init__(self, memory: Callable[[], Mapping[str, int]]) -> None:
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        found = self._memory()
        if found:
            family = GaugeMetricFamily(
                "lossd_gpu_memory_bytes",
                "Memory of the GPU: allocated in tensors, reserved for them, free, and total.",
                labels=["state"],
            )
            for state, size in found.items():
                family.add_metric([state], size)
            yield family
