"""Spans of a real `lossd serve`: where they go, what they say, and what happens where they cannot."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from lossd_client import Client, FocalLoss, InvalidInputError
from tests.whole.conftest import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what servers send."""

    def __init__(self):
        self.requests = []

    def Export(self, request, context):  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def resources(self):
        return [
            {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
            for request in self.requests
            for sent in request.resource_spans
        ]

    def spans(self):
        return [
            span
            for request in self.requests
            for sent in request.resource_spans
            for scope in sent.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector():
    """A collector and its address."""
    made = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield made, f"http://127.0.0.1:{port}"
        server.stop(None).wait(10)


@contextmanager
def traced(endpoint, **variables):
    """A server that sends its spans somewhere; its end is waited for, and its log is in a list."""
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}
    log = []
    with serving("--tracing", "--log-format", "json", **environment) as (process, address, _):
        yield address, log
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
        log += map(json.loads, rest.splitlines())


def call(address, label=0):
    with Client(address) as client:
        return client.compute_loss(FocalLoss(), np.ones((1, 2), np.float32), [label])


def test_spans_reach_the_collector_that_the_environment_names_before_the_server_ends(collector):
    made, endpoint = collector
    with traced(endpoint) as (address, _):
        call(address)
    assert {"lossd.v1.LossService/ComputeLoss", "decode", "queue", "compute", "encode"} == {
        span.name for span in made.spans()
    }
    assert made.resources()[0]["service.name"] == "lossd"


def test_the_environment_names_the_service_and_samples(collector):
    made, endpoint = collector
    with traced(endpoint, OTEL_SERVICE_NAME="losses-of-ours") as (address, _):
        call(address)
    assert made.resources()[0]["service.name"] == "losses-of-ours"
    made.requests.clear()
    with traced(endpoint, OTEL_TRACES_SAMPLER="always_off") as (address, _):
        call(address)
    assert made.spans() == []


def test_lines_of_the_log_say_of_which_trace_they_are(collector):
    made, endpoint = collector
    with traced(endpoint) as (address, log), pytest.raises(InvalidInputError):
        call(address, label=99)
    (refused,) = (line for line in log if line["event"] == "refused")
    (span,) = (span for span in made.spans() if span.name == "lossd.v1.LossService/ComputeLoss")
    assert (refused["trace_id"], refused["span_id"]) == (span.trace_id.hex(), span.span_id.hex())
    assert "trace_id" not in log[-1]


@pytest.mark.timeout(120)
def test_a_collector_that_is_not_there_costs_lines_in_the_log_and_nothing_else():
    with traced("http://127.0.0.1:1", OTEL_EXPORTER_OTLP_TIMEOUT="1") as (address, log):
        assert call(address).loss >= 0
    assert log[-1]["event"] == "stopped"


def test_without_the_extra_the_start_fails_in_one_line():
    program = "import sys; sys.modules['opentelemetry'] = None\n"
    program += (
        "sys.argv = ['lossd', 'serve', '--tracing', '--metrics-port', '-1', '--listen', '127.0.0.1:0']\n"
    )
    program += "from lossd_server.cli import main; main()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "lossd: tracing: needs OpenTelemetry: pip install 'lossd[otel]'\n"


def test_without_tracing_and_in_the_client_opentelemetry_is_not_imported():
    program = """
import sys
from lossd_client import Client, FocalLoss
from lossd_server.config import ServerConfig
from lossd_server.rpc import Server
with Server(ServerConfig(listen=("127.0.0.1:0",), metrics_port=None, device="cpu")) as server:
    with Client(server.addresses[0]) as client:
        client.compute_loss(FocalLoss(), [[1.0, 2.0]], [0])
assert not any(name.startswith("opentelemetry") for name in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
