"""What the dashboard shows: every query, with its unit and what an operator should make of it."""

from panel import CALLS, ERRORS, LOSSD, OURS, SAME, SERVERS, Panel, quantile, quantiles, rate, total

NOT_SHOWN = {
    "grpc_server_started_total": "calls are counted when they end; until then they are in flight",
    "process_virtual_memory_bytes": "address space, most of which is never touched",
}
"""Metrics of the server that are not on the dashboard, and why."""


OVERVIEW = [
    Panel(
        title="Serving",
        about="Servers that take calls.",
        unit="none",
        kind="stat",
        width=4,
        queries={"serving": f'sum(lossd_state{{state="serving", {SERVERS}}}) or vector(0)'},
    ),
    Panel(
        title="Calls",
        about="Calls that ended, a second.",
        unit="reqps",
        kind="stat",
        width=4,
        queries={"calls": total("grpc_server_handled_total", LOSSD)},
    ),
    Panel(
        title="Errors",
        about="Share of calls that ended with an error which is not the caller's.",
        unit="percentunit",
        kind="stat",
        width=4,
        bounds=(0.01, 0.05),
        queries={
            "errors": f"{total('grpc_server_handled_total', f'{LOSSD}, {ERRORS}')}"
            f" / ({total('grpc_server_handled_total', LOSSD)} > 0) or vector(0)"
        },
    ),
    Panel(
        title="Latency, p99",
        about="99 of 100 calls take no longer, streams aside.",
        unit="s",
        kind="stat",
        width=4,
        bounds=(0.5, 1),
        queries={
            "p99": f"histogram_quantile(0.99, {rate('grpc_server_handling_seconds_bucket', CALLS, 'le')})"
        },
    ),
    Panel(
        title="Refused",
        about="Requests refused for any reason, a second.",
        unit="reqps",
        kind="stat",
        width=4,
        queries={"refused": total("lossd_refusals_total")},
    ),
    Panel(
        title="Version",
        about="What runs, and where.",
        unit="none",
        kind="stat",
        width=4,
        queries={"{{version}}, {{device}}": f"count by (version, device) (lossd_build_info{{{SERVERS}}})"},
    ),
]

CALLS = [
    Panel(
        title="Calls by method",
        about="Calls that ended; a stream is one call, and its requests are counted as messages.",
        unit="reqps",
        stacked=True,
        queries={"{{grpc_method}}": rate("grpc_server_handled_total", LOSSD, "grpc_method")},
    ),
    Panel(
        title="Calls by code",
        about="How calls ended, except well.",
        unit="reqps",
        stacked=True,
        queries={
            "{{grpc_code}}": rate("grpc_server_handled_total", f'{LOSSD}, grpc_code!="OK"', "grpc_code")
        },
    ),
    Panel(
        title="Refusals by reason",
        about="Why requests were refused: callers' mistakes, and what there is no capacity for.",
        unit="reqps",
        stacked=True,
        queries={"{{reason}}": f"{rate('lossd_refusals_total', SERVERS, 'reason')} > 0 or vector(0)"},
    ),
    Panel(
        title="Latency of $method",
        about="How many calls took how long.",
        unit="s",
        kind="heatmap",
        by_method=True,
        queries={
            "{{le}}": rate("grpc_server_handling_seconds_bucket", f'{LOSSD}, grpc_method=~"$method"', "le")
        },
    ),
    Panel(
        title="Latency by method",
        about="Median and 99th percentile of calls, streams aside.",
        unit="s",
        queries={
            f"p{round(100 * q)} {{{{grpc_method}}}}": quantile(
                q, "grpc_server_handling_seconds", CALLS, "grpc_method"
            )
            for q in (0.5, 0.99)
        },
    ),
    Panel(
        title="Messages",
        about="Messages of all calls, those of streams included: received upwards, sent downwards.",
        unit="cps",
        queries={
            "received {{grpc_method}}": rate("grpc_server_msg_received_total", LOSSD, "grpc_method"),
            "sent {{grpc_method}}": f"-{rate('grpc_server_msg_sent_total', LOSSD, 'grpc_method')}",
        },
    ),
]

WORK = [
    Panel(
        title="Stages, seconds a second",
        about="Where the time of all requests goes. Where most of it is queue, more servers help.",
        unit="s",
        stacked=True,
        queries={"{{stage}}": rate("lossd_stage_seconds_sum", SERVERS, "stage")},
    ),
    Panel(
        title="Stages, p99",
        about="The slowest hundredth of each stage.",
        unit="s",
        queries={"{{method}} {{stage}}": quantile(0.99, "lossd_stage_seconds", SERVERS, "method, stage")},
    ),
    Panel(
        title="Wait for the device",
        about="How long requests wait for their turn.",
        unit="s",
        queries={
            f"p{round(100 * q)} {{{{instance}}}}": quantile(
                q, "lossd_stage_seconds", f'stage="queue", {SERVERS}', "instance"
            )
            for q in (0.5, 0.9)
        },
    ),
    Panel(
        title="In flight",
        about="Requests being served.",
        unit="none",
        stacked=True,
        queries={"{{instance}} {{method}}": f"sum by (instance, method) (lossd_in_flight{{{SERVERS}}})"},
    ),
    Panel(
        title="Bytes in flight",
        about="Bytes of the requests that were let in; beyond --max-in-flight-bytes others are refused.",
        unit="bytes",
        stacked=True,
        queries={"{{instance}}": f"lossd_in_flight_bytes{{{SERVERS}}}"},
    ),
    Panel(
        title="Budgets",
        about="Shares of --max-in-flight and --max-in-flight-bytes that are taken; at 1 calls are refused.",
        unit="percentunit",
        queries={"{{instance}} {{of}}": f"lossd_budget_used_ratio{{{SERVERS}}}"},
    ),
    Panel(
        title="Queue",
        about="Requests that wait for the device.",
        unit="none",
        queries={"{{instance}}": f"lossd_queue_length{{{SERVERS}}}"},
    ),
    Panel(
        title="Device batch",
        about="Requests and items that the device was given together.",
        unit="none",
        queries={
            **quantiles("lossd_device_batch_jobs", "instance", "requests "),
            **quantiles("lossd_device_batch_items", "instance", "items "),
        },
    ),
    Panel(
        title="Device wedged",
        about="1 while the device does not come back from an evaluation.",
        unit="none",
        queries={"{{instance}}": f"lossd_device_wedged{{{SERVERS}}}"},
    ),
    Panel(
        title="Batch",
        about="Items in a request, as callers batch them.",
        unit="none",
        queries=quantiles("lossd_batch_items"),
    ),
    Panel(
        title="Request size",
        about="Bytes of a request as it came. Tensors in shared memory do not count.",
        unit="bytes",
        queries=quantiles("lossd_request_bytes"),
    ),
    Panel(
        title="Answer size",
        about="Bytes of an answer. Gradients in shared memory do not count.",
        unit="bytes",
        queries=quantiles("lossd_response_bytes"),
    ),
    Panel(
        title="Positives",
        about="Rows and locations that carry an object.",
        unit="cps",
        queries={"{{method}}": rate("lossd_positives_total", SERVERS, "method")},
    ),
    Panel(
        title="NaN and infinity",
        about="Input tensors that hold any. A training that diverged looks like this.",
        unit="cps",
        queries={"{{instance}}": rate("lossd_non_finite_inputs_total", SERVERS, "instance")},
    ),
]

RESOURCES = [
    Panel(
        title="Memory",
        about="Resident memory, of which shared memory is a part, and what the control group grants.",
        unit="bytes",
        queries={
            "{{instance}}": f"process_resident_memory_bytes{{{SERVERS}}} {OURS}",
            "{{instance}} shared with callers": f"lossd_shared_memory_bytes{{{SERVERS}}}",
            "{{instance}} limit": f"lossd_memory_limit_bytes{{{SERVERS}}}",
        },
    ),
    Panel(
        title="GPU memory",
        about="Nothing on a CPU. What is reserved and not allocated waits for the next request.",
        unit="bytes",
        queries={"{{instance}} {{state}}": f"lossd_gpu_memory_bytes{{{SERVERS}}}"},
    ),
    Panel(
        title="Cores",
        about="Processor time, seconds a second.",
        unit="none",
        queries={"{{instance}}": f"rate(process_cpu_seconds_total{{{SERVERS}}}[$__rate_interval]) {OURS}"},
    ),
    Panel(
        title="File descriptors",
        about="Share of those that a process may hold. Each connection is one, and each shared region.",
        unit="percentunit",
        queries={"{{instance}}": f"process_open_fds{{{SERVERS}}} / process_max_fds{{{SERVERS}}} {OURS}"},
    ),
    Panel(
        title="Up, by state",
        about="How long a server has been up, and the state that it is in.",
        unit="s",
        queries={
            "{{instance}} {{state}}": f"(lossd_state{{{SERVERS}}} == 1)"
            f" * {SAME} group_left () (time() - process_start_time_seconds{{{SERVERS}}})"
        },
    ),
    Panel(
        title="Reloads",
        about="Certificates and tokens that were read anew, or could not be.",
        unit="none",
        queries={
            "{{file}} {{outcome}}": f"sum by (file, outcome)"
            f" (increase(lossd_reloads_total{{{SERVERS}}}[$__rate_interval]))"
        },
    ),
    Panel(
        title="Compiled kernels",
        about="0 where the slower operations of torch evaluate.",
        unit="none",
        queries={"{{instance}}": f"lossd_compiled_kernels{{{SERVERS}}}"},
    ),
]

ROWS = {"Overview": OVERVIEW, "Calls": CALLS, "Work": WORK, "Resources": RESOURCES}
"""All panels, by the title of the row that they stand in."""
