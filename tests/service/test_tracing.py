"""Spans of calls and their stages, in memory."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd_client import AsyncClient, Client, FocalLoss
from tests.service import custom_modules
from tests.service.metrics import eventually
from tests.service.support import (
    connect,
    good_assign_request,
    good_loss_request,
    loss_request,
    make_server,
    refusal,
)

SERVICE = "lossd.v1.LossService"
STAGES = ["decode", "queue", "compute", "encode"]
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")]


@pytest.fixture(scope="module")
def exporter():
    """Has this program's spans kept in memory: a program can set this up once."""
    made = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(made))
    trace.set_tracer_provider(provider)
    return made


@pytest.fixture(scope="module")
def traced(exporter):
    with make_server(tracing=True, load=custom_modules.ALL) as running:
        yield running


@pytest.fixture
def spans(exporter):
    """A function that returns the finished spans of one trace once its server span has ended."""
    exporter.clear()

    def of_trace(wanted=TRACE, calls=1):
        def found():
            return [s for s in exporter.get_finished_spans() if f"{s.context.trace_id:032x}" == wanted]

        eventually(lambda: sum(span.kind is SpanKind.SERVER for span in found()) == calls)
        return found()

    return of_trace


def server_span(spans):
    (span,) = (span for span in spans if span.kind is SpanKind.SERVER)
    return span


def children(spans, parent):
    found = [span for span in spans if span.parent and span.parent.span_id == parent.context.span_id]
    return sorted(found, key=lambda span: span.start_time)


def names(spans):
    return [span.name for span in spans]


def test_a_call_is_a_child_of_its_callers_span_with_its_stages_below(traced, spans):
    with connect(traced) as stub:
        stub.ComputeLoss(good_loss_request(), metadata=CALLER)
    found = spans()
    call = server_span(found)
    assert call.name == f"{SERVICE}/ComputeLoss"
    assert f"{call.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(call.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/ComputeLoss",
        "rpc.response.status_code": "OK",
    }
    assert call.status.status_code is StatusCode.UNSET
    assert names(children(found, call)) == STAGES


def test_stages_lie_within_their_call_one_after_the_other_and_last_as_the_answer_says(traced, spans):
    with connect(traced) as stub:
        timings = stub.ComputeLoss(good_loss_request(), metadata=CALLER).timings
    found = spans()
    call = server_span(found)
    stages = children(found, call)
    assert call.start_time <= stages[0].start_time
    assert stages[-1].end_time <= call.end_time
    assert all(before.end_time <= after.start_time for before, after in itertools.pairwise(stages))
    for stage in ("decode", "queue", "compute"):
        (span,) = (span for span in stages if span.name == stage)
        assert (span.end_time - span.start_time) / 1e3 == pytest.approx(
            getattr(timings, f"{stage}_us"), abs=2
        )


def test_a_request_in_chunks_has_its_stages_below_its_call(traced, spans):
    message = good_loss_request().SerializeToString()
    chunks = [
        pb.ComputeLossInChunksRequest(message_bytes=len(message), data=message[:9]),
        pb.ComputeLossInChunksRequest(data=message[9:]),
    ]
    with connect(traced) as stub:
        assert list(stub.ComputeLossInChunks(iter(chunks), metadata=CALLER))
    call = server_span(found := spans())
    assert call.name == f"{SERVICE}/ComputeLossInChunks"
    assert names(children(found, call)) == STAGES


def test_why_a_request_in_chunks_was_refused_is_told_by_its_call(traced, spans):
    with connect(traced) as stub, pytest.raises(grpc.RpcError):
        list(
            stub.ComputeLossInChunks(iter([pb.ComputeLossInChunksRequest(message_bytes=-1)]), metadata=CALLER)
        )
    call = server_span(spans())
    assert call.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert call.attributes["lossd.reason"] == "MALFORMED_REQUEST"
    assert call.attributes["lossd.field"] == "message_bytes"


def test_the_requests_of_a_stream_are_spans_below_it(traced, spans):
    good, bad = good_loss_request(), good_loss_request()
    bad.ClearField("focal")
    with connect(traced) as stub:
        envelopes = [pb.ComputeLossStreamRequest(id=n, request=q) for n, q in enumerate((good, bad, good))]
        assert len(list(stub.ComputeLossStream(iter(envelopes), metadata=CALLER))) == 3
    found = spans()
    stream = server_span(found)
    assert stream.name == f"{SERVICE}/ComputeLossStream"
    requests = children(found, stream)
    assert names(requests) == ["ComputeLoss"] * 3
    reasons = sorted(str(request.attributes.get("lossd.reason")) for request in requests)
    assert reasons == ["MISSING_FIELD", "None", "None"]
    for request in requests:
        done = "lossd.reason" not in request.attributes
        assert names(children(found, request)) == (STAGES if done else ["decode", "encode"])


def test_what_the_caller_got_wrong_is_no_error_of_the_servers_span(traced, spans):
    bad = good_loss_request()
    bad.items[0].focal.inputs.dtype = 99
    with connect(traced) as stub, pytest.raises(grpc.RpcError):
        stub.ComputeLoss(bad, metadata=CALLER)
    call = server_span(spans())
    assert call.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert call.attributes["lossd.reason"] == "INVALID_DTYPE"
    assert call.attributes["lossd.field"] == "items[0].focal.inputs"
    assert call.status.status_code is StatusCode.UNSET


def test_what_the_server_is_to_blame_for_is_an_error_of_its_span(traced, spans):
    bad = loss_request(losses_pb2.CustomLoss(name="Raises"), [{"pred": np.ones(1, np.float32)}])
    with connect(traced) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ComputeLoss(bad, metadata=CALLER)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    call = server_span(spans())
    assert call.status.status_code is StatusCode.ERROR
    assert call.attributes["lossd.reason"] == "CUSTOM_LOSS_FAILED"


@pytest.mark.parametrize("header", ["", "nonsense", "00-zz-11-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_caller_without_a_trace_or_with_nonsense_is_the_root_of_its_own(traced, exporter, header):
    exporter.clear()
    with connect(traced) as stub:
        stub.AssignTargets(good_assign_request(), metadata=[("traceparent", header)])
    eventually(lambda: f"{SERVICE}/AssignTargets" in names(exporter.get_finished_spans()))
    assert server_span(exporter.get_finished_spans()).parent is None


def test_the_client_hands_its_trace_on(traced, spans):
    tracer = trace.get_tracer("test")
    logits, labels = [[1.0, 2.0]], [0]
    with tracer.start_as_current_span("training step") as step, Client(traced.addresses[0]) as client:
        client.compute_loss(FocalLoss(), logits, labels)
        list(client.compute_loss_stream(FocalLoss(), [(logits, labels)]))
    wanted = f"{step.get_span_context().trace_id:032x}"
    calls = [span for span in spans(wanted, calls=2) if span.kind is SpanKind.SERVER]
    assert {span.parent.span_id for span in calls} == {step.get_span_context().span_id}


async def _call(address):
    async with AsyncClient(address) as client:
        await client.compute_loss(FocalLoss(), [[1.0, 2.0]], [0])


def test_the_asynchronous_client_hands_its_trace_on(traced, spans):
    import asyncio

    with trace.get_tracer("test").start_as_current_span("step") as step:
        asyncio.run(_call(traced.addresses[0]))
    call = server_span(spans(f"{step.get_span_context().trace_id:032x}"))
    assert call.parent.span_id == step.get_span_context().span_id


def test_calls_at_a_time_do_not_mix_their_traces(traced, spans):
    traces = [f"{n:032x}" for n in range(1, 17)]
    with connect(traced) as stub, ThreadPoolExecutor(8) as pool:

        def call(wanted):
            return stub.ComputeLoss(
                good_loss_request(), metadata=[("traceparent", f"00-{wanted}-b7ad6b7169203331-01")]
            )

        list(pool.map(call, traces))
    for wanted in traces:
        found = spans(wanted)
        assert names(children(found, server_span(found))) == STAGES


def test_health_has_no_spans(traced, exporter):
    exporter.clear()
    with grpc.insecure_channel(traced.addresses[0]) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert exporter.get_finished_spans() == ()


def test_without_tracing_there_are_no_spans(exporter):
    exporter.clear()
    with make_server() as server, connect(server) as stub:
        stub.ComputeLoss(good_loss_request(), metadata=CALLER)
        assert refusal(stub.ComputeLoss, pb.ComputeLossRequest()).reason == "MISSING_FIELD"
    assert exporter.get_finished_spans() == ()


def test_a_call_that_its_caller_does_not_sample_has_no_spans(traced, exporter):
    exporter.clear()
    with connect(traced) as stub:
        metadata = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-00")]
        stub.ComputeLoss(good_loss_request(), metadata=metadata)
        envelope = pb.ComputeLossStreamRequest(request=good_loss_request())
        assert len(list(stub.ComputeLossStream(iter([envelope]), metadata=metadata))) == 1
        stub.AssignTargets(good_assign_request())
    eventually(lambda: f"{SERVICE}/AssignTargets" in names(exporter.get_finished_spans()))
    assert f"{TRACE}" not in {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()}
