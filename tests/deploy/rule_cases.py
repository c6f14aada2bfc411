"""When each alert must fire and when it must not, as series of promtool's."""

from dataclasses import dataclass

SERVER = 'namespace="vision",job="loss",instance="a"'
JOB = 'job="loss",namespace="vision"'
SERVICE = 'grpc_service="lossd.v1.LossService",grpc_method="ComputeLoss",grpc_type="unary"'
HOUR = 90
"""Minutes for which series go on: beyond every `for` and every range."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Series by name, and with which labels an alert fires then, if it does.

    Attributes:
        series: Values at each minute, in promtool's notation.
        labels: Labels of each alert that fires.
        minute: When it is looked at.
        begins: From when on the alert has its reason, which must last as long as the rule says.
    """

    series: dict[str, str]
    labels: tuple[str, ...] = ()
    minute: int = 60
    begins: int = 0


def server(metric, labels="", of=SERVER):
    return f"{metric}{{{of}{',' if labels else ''}{labels}}}"


def always(value):
    return f"{value}x{HOUR}"


def rising(per_minute):
    return f"0+{per_minute}x{HOUR}"


def twin(suffix):
    """The labels of a twin of `ComputeLoss`."""
    return SERVICE.replace("ComputeLoss", f"ComputeLoss{suffix}").replace("unary", "bidi_stream")


def refusals(reason, per_minute, method="ComputeLoss"):
    return {server("lossd_refusals_total", f'reason="{reason}",method="{method}"'): rising(per_minute)}


def handled(per_minute, **of_code):
    codes = {"OK": per_minute, **of_code}
    return {
        server("grpc_server_handled_total", f'{SERVICE},grpc_code="{code}"'): rising(rate)
        for code, rate in codes.items()
    }


def histogram(metric, labels, per_minute):
    """A histogram whose buckets rise as fast as given, by upper bound."""
    return {
        server(f"{metric}_bucket", f'{labels},le="{bound}"'): rising(rate)
        for bound, rate in per_minute.items()
    }


def gpu(free, reserved, allocated, total=100):
    sizes = {"free": free, "reserved": reserved, "allocated": allocated, "total": total}
    return {
        server("lossd_gpu_memory_bytes", f'state="{state}"'): always(size) for state, size in sizes.items()
    }


BUILD = {server("lossd_build_info", 'version="1",device="cpu"'): always(1)}
SERVING = {server("lossd_state", 'state="serving"'): always(1)}
GONE = dict.fromkeys((*BUILD, *SERVING), "1x20 stale")
OTHER = 'namespace="vision",job="loss",instance="b"'

FIRES = {
    "LossdAbsent": [Case(series={'up{job="other"}': always(1)}, labels=("",))],
    "LossdNoReplicas": [
        Case(series=GONE, labels=(JOB,), minute=30, begins=20),
        Case(series={**BUILD, server("lossd_state", 'state="serving"'): always(0)}, labels=(JOB,)),
    ],
    "LossdReplicaDown": [
        Case(series={**GONE, server("up"): "1x20 0x70"}, labels=(SERVER,), minute=30, begins=20)
    ],
    "LossdRestarting": [
        Case(
            series={**BUILD, server("process_start_time_seconds"): "0+1x3 3x90"}, labels=(SERVER,), minute=20
        )
    ],
    "LossdStartStuck": [
        Case(
            series={server("lossd_state", 'state="starting"'): always(1)},
            labels=(f'{SERVER},state="starting"',),
        )
    ],
    "LossdDrainStuck": [
        Case(
            series={server("lossd_state", 'state="draining"'): always(1)},
            labels=(f'{SERVER},state="draining"',),
        )
    ],
    "LossdDeviceWedged": [Case(series={server("lossd_device_wedged"): always(1)}, labels=(SERVER,))],
    "LossdReloadFails": [
        Case(
            series={server("lossd_reloads_total", 'file="tokens",outcome="failed"'): "0x30 1x60"},
            labels=(f'{SERVER},file="tokens"',),
        )
    ],
    "LossdUnauthenticated": [Case(series=refusals("UNAUTHENTICATED", 60), labels=(JOB,))],
    "LossdNearlyFull": [
        Case(
            series={server("lossd_budget_used_ratio", 'of="bytes"'): always(0.9)},
            labels=(f'{SERVER},of="bytes"',),
        )
    ],
    "LossdOverloaded": [
        Case(series={**handled(90), **refusals("OVERLOADED", 10)}, labels=(JOB,)),
        Case(series={**handled(90), **refusals("TOO_MANY_STREAMS", 10)}, labels=(JOB,)),
    ],
    "LossdErrors": [
        Case(series=handled(90, INTERNAL=10), labels=(f'{JOB},grpc_method="ComputeLoss"',)),
        Case(
            series=handled(90, UNAVAILABLE=5, DEADLINE_EXCEEDED=5),
            labels=(f'{JOB},grpc_method="ComputeLoss"',),
        ),
    ],
    "LossdInternalFault": [
        Case(
            series={server("lossd_refusals_total", 'reason="INTERNAL",method="ComputeLoss"'): "0x55 1x35"},
            labels=(f'{JOB},method="ComputeLoss"',),
        )
    ],
    "LossdCustomLossFails": [
        Case(
            series={
                **refusals("CUSTOM_LOSS_FAILED", 2),
                server("lossd_request_bytes_count", 'method="ComputeLoss"'): rising(100),
            },
            labels=(JOB,),
        )
    ],
    "LossdSlow": [
        Case(
            series=histogram(
                "grpc_server_handling_seconds", SERVICE, {"0.5": 90, "1.0": 95, "2.5": 100, "+Inf": 100}
            ),
            labels=(f'{JOB},grpc_method="ComputeLoss"',),
        ),
        Case(
            series=histogram(
                "grpc_server_handling_seconds",
                twin("InChunks"),
                {"0.5": 90, "1.0": 95, "2.5": 100, "+Inf": 100},
            ),
            labels=(f'{JOB},grpc_method="ComputeLossInChunks"',),
        ),
    ],
    "LossdNonFiniteInputs": [
        Case(
            series={
                server("lossd_non_finite_inputs_total"): rising(10),
                server("lossd_batch_items_sum", 'method="ComputeLoss"'): rising(100),
            },
            labels=(JOB,),
        )
    ],
    "LossdQueue": [
        Case(
            series=histogram(
                "lossd_stage_seconds",
                'stage="queue",method="ComputeLoss"',
                {"0.5": 80, "1.0": 100, "+Inf": 100},
            ),
            labels=(f'{JOB},method="ComputeLoss"',),
        )
    ],
    "LossdOutOfMemory": [
        Case(
            series={
                server("lossd_refusals_total", 'reason="OUT_OF_MEMORY",method="ComputeLoss"'): "0x55 1x35"
            },
            labels=(JOB,),
        )
    ],
    "LossdMemory": [
        Case(
            series={
                server("process_resident_memory_bytes"): always(95),
                server("lossd_memory_limit_bytes"): always(100),
            },
            labels=(SERVER,),
        )
    ],
    "LossdGpuMemory": [Case(series=gpu(free=2, reserved=40, allocated=39), labels=(SERVER,))],
    "LossdFileDescriptors": [
        Case(
            series={
                **BUILD,
                server("process_open_fds"): always(900),
                server("process_max_fds"): always(1000),
            },
            labels=(SERVER,),
        )
    ],
    "LossdSlowKernels": [Case(series={server("lossd_compiled_kernels"): always(0)}, labels=(SERVER,))],
}

SILENT = {
    "LossdAbsent": [Case(series=BUILD)],
    "LossdNoReplicas": [
        Case(series={**BUILD, **SERVING}),
        Case(  # one of two is gone
            series={
                **GONE,
                server("lossd_build_info", of=OTHER): always(1),
                server("lossd_state", 'state="serving"', of=OTHER): always(1),
            },
            minute=30,
        ),
        Case(series=GONE, minute=85),  # removed for good, an hour ago
    ],
    "LossdReplicaDown": [
        Case(series={**BUILD, server("up"): always(1)}),
        Case(series={'up{job="other",instance="c"}': always(0)}),  # someone else's server
        Case(series={**GONE, server("up"): "1x20 0x2 1x70"}, minute=30),
    ],
    "LossdRestarting": [
        Case(series={**BUILD, server("process_start_time_seconds"): "0 1 2x90"}, minute=20),
        Case(series={'process_start_time_seconds{job="other"}': rising(1)}),
    ],
    "LossdStartStuck": [
        Case(series={server("lossd_state", 'state="starting"'): "1x5 0x90"}),
        Case(series={server("lossd_state", 'state="starting"'): always(1)}, minute=5),
    ],
    "LossdDrainStuck": [Case(series={server("lossd_state", 'state="draining"'): "0x58 1x3"})],
    "LossdDeviceWedged": [Case(series={server("lossd_device_wedged"): "0x59 1x3"})],
    "LossdReloadFails": [
        Case(series={server("lossd_reloads_total", 'file="tokens",outcome="failed"'): always(1)}),
        Case(series={server("lossd_reloads_total", 'file="tokens",outcome="ok"'): rising(1)}),
    ],
    "LossdUnauthenticated": [Case(series=refusals("UNAUTHENTICATED", 1))],
    "LossdNearlyFull": [Case(series={server("lossd_budget_used_ratio", 'of="bytes"'): always(0.5)})],
    "LossdOverloaded": [
        Case(series={**handled(1000), **refusals("OVERLOADED", 1)}),
        Case(series={**handled(90), **refusals("RATE_LIMITED", 90)}),  # a caller's own limit
    ],
    "LossdErrors": [
        Case(series=handled(100, INTERNAL=1)),
        Case(series=handled(1, INVALID_ARGUMENT=100, CANCELLED=100, RESOURCE_EXHAUSTED=100)),
        Case(series=handled(0, INTERNAL=0)),
        Case(series={**handled(0, INTERNAL=0), **handled(1, INTERNAL=1)}),  # a call or two a minute
    ],
    "LossdInternalFault": [Case(series={**refusals("INTERNAL", 0), **refusals("INVALID_SHAPE", 100)})],
    "LossdCustomLossFails": [
        Case(
            series={
                **refusals("CUSTOM_LOSS_FAILED", 1),
                server("lossd_request_bytes_count", 'method="ComputeLoss"'): rising(1000),
            }
        )
    ],
    "LossdSlow": [
        Case(
            series=histogram(
                "grpc_server_handling_seconds", SERVICE, {"0.5": 100, "1.0": 100, "2.5": 100, "+Inf": 100}
            )
        ),
        Case(  # streams are open for hours
            series=histogram(
                "grpc_server_handling_seconds",
                twin("Stream"),
                {"0.5": 0, "+Inf": 100},
            )
        ),
        Case(series=histogram("grpc_server_handling_seconds", SERVICE, {"1.0": 0, "+Inf": 0})),
    ],
    "LossdNonFiniteInputs": [
        Case(
            series={
                server("lossd_non_finite_inputs_total"): rising(1),
                server("lossd_batch_items_sum", 'method="ComputeLoss"'): rising(100),
            }
        )
    ],
    "LossdQueue": [
        Case(
            series=histogram(
                "lossd_stage_seconds",
                'stage="queue",method="ComputeLoss"',
                {"0.5": 95, "1.0": 100, "+Inf": 100},
            )
        )
    ],
    "LossdOutOfMemory": [Case(series=refusals("OUT_OF_MEMORY", 0))],
    "LossdMemory": [
        Case(
            series={
                server("process_resident_memory_bytes"): always(80),
                server("lossd_memory_limit_bytes"): always(100),
            }
        ),
        Case(series={server("process_resident_memory_bytes"): always(80)}),  # no limit
    ],
    "LossdGpuMemory": [
        Case(series=gpu(free=2, reserved=90, allocated=10)),  # it only waits for the next request
        Case(series={}),
    ],
    "LossdFileDescriptors": [
        Case(
            series={**BUILD, server("process_open_fds"): always(100), server("process_max_fds"): always(1000)}
        ),
        Case(series={server("process_open_fds"): always(900), server("process_max_fds"): always(1000)}),
    ],
    "LossdSlowKernels": [
        Case(series={server("lossd_compiled_kernels"): always(1)}),
        Case(series={server("lossd_compiled_kernels"): "0x10 1x80"}),  # still compiling
    ],
}
