"""Calls that are refused before their body is read."""

import threading

import grpc
import pytest

from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server.errors import AccessError, RateLimitedError, Reason
from lossd_server.rpc.interceptor import Intercepted, MetricsInterceptor
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.refusals import Refusals
from lossd_server.rpc.refusing import RefusingHandlers
from tests.service.support import good_loss_request, refusal, refusal_of

METHODS = ("ComputeLoss", "AssignTargets", "GetServerInfo")
STREAMS = ("ComputeLossStream", "AssignTargetsStream")


class Refusing(grpc.GenericRpcHandler):
    """A service that refuses everything."""

    def __init__(self, error):
        self.metrics = Metrics()
        self._refusing = RefusingHandlers(Refusals(self.metrics))
        self._error = error

    def service(self, handler_call_details):
        return self._refusing.handler(handler_call_details.method, self._error)


class NoThreads:
    """The pool of a server whose threads are all at work for good."""

    def submit(self, *_arguments):
        raise AssertionError("a refusal waits for work")


@pytest.fixture
def refusing():
    """A function that serves refusals and returns the service and a channel to it."""
    open_now = []

    def serve(error):
        service = Refusing(error)
        server = grpc.server(NoThreads())
        server.add_generic_rpc_handlers([Intercepted(service, [MetricsInterceptor(service.metrics)])])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        open_now.extend([(channel.close,), (server.stop, None)])
        return service, channel

    yield serve
    for call, *arguments in open_now:
        call(*arguments)


def handled(service, **labels):
    return service.metrics.registry.get_sample_value("grpc_server_handled_total", labels)


def test_a_refusal_waits_neither_for_the_body_nor_for_a_worker(refusing):
    _, channel = refusing(AccessError(Reason.UNAUTHENTICATED, "no token"))
    released = threading.Event()

    def bodies():
        released.wait(30)
        yield good_loss_request().SerializeToString()

    # A caller of `ComputeLoss` that has sent its header and nothing of its body.
    call = channel.stream_unary("/lossd.v1.LossService/ComputeLoss")
    future = call.future(bodies(), timeout=30)
    assert refusal_of(future.exception()).reason == "UNAUTHENTICATED"
    released.set()


@pytest.mark.parametrize("name", METHODS)
def test_calls_of_every_kind_are_refused_and_counted_by_their_own_kind(refusing, name):
    service, channel = refusing(AccessError(Reason.UNAUTHENTICATED, "no token"))
    found = refusal(getattr(LossServiceStub(channel), name), good_loss_request())
    assert (found.code, found.reason, found.message) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "UNAUTHENTICATED",
        "no token",
    )
    labels = {"grpc_service": "lossd.v1.LossService", "grpc_method": name, "grpc_type": "unary"}
    assert handled(service, **labels, grpc_code="UNAUTHENTICATED") == 1
    refusals = {"method": name, "reason": "UNAUTHENTICATED"}
    assert service.metrics.registry.get_sample_value("lossd_refusals_total", refusals) == 1


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_refused_like_their_twins(refusing, name):
    service, channel = refusing(AccessError(Reason.UNAUTHENTICATED, "no token"))
    with pytest.raises(grpc.RpcError) as caught:
        next(getattr(LossServiceStub(channel), name)(iter(())))
    assert refusal_of(caught.value).reason == "UNAUTHENTICATED"
    labels = {"grpc_service": "lossd.v1.LossService", "grpc_method": name, "grpc_type": "bidi_stream"}
    assert handled(service, **labels, grpc_code="UNAUTHENTICATED") == 1


def test_a_refusal_for_now_says_when_to_come_again(refusing):
    _, channel = refusing(RateLimitedError("5 requests a second", retry_seconds=0.2, limit=5))
    found = refusal(LossServiceStub(channel).ComputeLoss, good_loss_request())
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert found.retry_seconds == 0.2
    assert found.metadata == {"limit": "5"}
