"""The service on gRPC: bytes in and out, errors as status, streams of requests.

Handlers see raw bytes, so that parsing is timed, and bytes that are no message are the caller's
error and not the server's. They take those out of what gRPC holds until the call ends, so that a
large request is gone before its answer is there.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
import structlog

from lossd import chunks
from lossd.envelopes import envelope
from lossd.v1 import loss_service_pb2 as pb
from lossd_server.engine import Admission, Home, LockedBudget, Place
from lossd_server.errors import InvalidInputError, LossdError, Reason, UnavailableError
from lossd_server.rpc.at_work import AtWork, Packing
from lossd_server.rpc.bodies import Body
from lossd_server.rpc.caller import Caller
from lossd_server.rpc.door import Door
from lossd_server.rpc.forms import Forms, Request
from lossd_server.rpc.interceptor import ObservedMethod
from lossd_server.rpc.lane import Lane, is_lane
from lossd_server.rpc.method_names import IN_CHUNKS, STREAM
from lossd_server.rpc.methods import Method, StreamMethod
from lossd_server.rpc.metrics import Metrics
from lossd_server.rpc.pipeline import WIDTH, Pipeline
from lossd_server.rpc.refusals import Refusals
from lossd_server.rpc.service import LossService
from lossd_server.rpc.stages import Stages
from lossd_server.rpc.standard import too_many
from lossd_server.rpc.status import code_of, stream_error

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LossService"].full_name

_END_SECONDS = 0.25
"""What is left of a drain for the end of a stream to reach its caller."""

_log = structlog.get_logger()

T = TypeVar("T")


class Handlers:
    """The gRPC handlers of a service.

    Unary methods take a stream of requests, as far as gRPC knows: it calls such a handler at once, where it
    would have its thread wait for the body of any other for as long as the caller likes.

    Args:
        service: What answers.
        metrics: What counts.
        refusals: Where refusals are recorded.
        admission: Who lets requests in.
        door: How they come in.
        home: The core of their threads.
        max_streams: Streams open at a time, and lanes beside them.
        stages: Makes what times the stages of a request, given the method's name and the call.
    """

    def __init__(
        self,
        service: LossService,
        metrics: Metrics,
        refusals: Refusals,
        admission: Admission,
        door: Door,
        home: Home,
        *,
        max_streams: int,
        stages: Callable[[str, grpc.ServicerContext], Stages] | None = None,
    ) -> None:
        self._metrics = metrics
        self._refusals = refusals
        self._admission = admission
        self._door = door
        self._home = home
        self._stages = stages
        self._streams, self._lanes = LockedBudget(max_streams), LockedBudget(max_streams)
        # As many threads as there can be requests: on a stream too, none waits behind another's.
        self._stream_pool = ThreadPoolExecutor(
            max_streams * WIDTH, thread_name_prefix="lossd-stream", initializer=home.settle
        )
        self._flows: set[Pipeline | Lane] = set()
        self._is_draining = False
        self._linger_until = math.inf
        compute = Method(name="ComputeLoss", forms=Forms(pb.ComputeLossRequest), answer=service.compute_loss)
        assign = Method(
            name="AssignTargets", forms=Forms(pb.AssignTargetsRequest), answer=service.assign_targets
        )
        info = Method(
            name="GetServerInfo", forms=Forms(pb.GetServerInfoRequest), answer=service.get_server_info
        )
        compute_stream = StreamMethod(
            method=compute,
            request=pb.ComputeLossStreamRequest,
            response=pb.ComputeLossStreamResponse,
        )
        assign_stream = StreamMethod(
            method=assign,
            request=pb.AssignTargetsStreamRequest,
            response=pb.AssignTargetsStreamResponse,
        )
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            **{m.name: self._unary_handler(m) for m in (compute, assign, info)},
            **{m.method.name + STREAM: self._stream_handler(m) for m in (compute_stream, assign_stream)},
            compute.name + IN_CHUNKS: self._chunked_handler(compute),
        }

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """Returns what a `grpc.Server` takes."""
        return grpc.method_handlers_generic_handler(SERVICE_NAME, self._handlers)

    def drain(self, seconds: float) -> None:
        """Takes no further request from any stream; those that were read are answered, then it ends.

        Args:
            seconds: How long that may take.
        """
        self._linger_until = time.monotonic() + seconds - _END_SECONDS
        self._is_draining = True
        for flow in list(self._flows):
            flow.wake()

    def close(self) -> None:
        """Lets the threads of streams go."""
        self._stream_pool.shutdown(wait=False, cancel_futures=True)

    def _unary_handler(self, method: Method) -> "grpc.RpcMethodHandler[Body, bytes]":
        def handle(bodies: Iterator[Body], call: grpc.ServicerContext) -> bytes:
            return self._serve(method, call, partial(self._door.receive, bodies), b"".join)

        return grpc.stream_unary_rpc_method_handler(handle, request_deserializer=Body)

    def _chunked_handler(self, method: Method) -> "grpc.RpcMethodHandler[Body, bytes]":
        def handle(bodies: Iterator[Body], call: grpc.ServicerContext) -> Iterator[bytes]:
            yield from self._serve(method, call, partial(self._door.assemble, bodies), chunks.cut)

        return grpc.stream_stream_rpc_method_handler(handle, request_deserializer=Body)

    def _serve(
        self,
        method: Method,
        call: grpc.ServicerContext,
        receive: Callable[[grpc.ServicerContext, Place], Body],
        pack: Packing[T],
    ) -> T:
        """Answers a call of one request; what keeps it from being answered is its status."""
        place = None
        try:
            place = self._door.enter(call)
            return self._answer(method, receive(call, place), call, place, pack)
        except grpc.RpcError as error:  # its caller is gone
            error.__traceback__ = None  # which leads to what of the body has come; gRPC keeps the error
            raise
        except Exception as error:  # noqa: BLE001  # every other exception gets its status here
            self._abort(method, error, call)
        finally:
            if place is not None:
                self._admission.leave(place)

    def _stream_handler(self, stream: StreamMethod) -> "grpc.RpcMethodHandler[Body, bytes]":
        as_calls = ObservedMethod(self._metrics, f"/{SERVICE_NAME}/{stream.method.name}")

        def handle(bodies: Iterator[Body], call: grpc.ServicerContext) -> Iterator[bytes]:
            self._count_until_answered(call)
            peer = call.peer()
            is_one_at_a_time = is_lane(call)
            seats = self._lanes if is_one_at_a_time else self._streams
            if not seats.take(peer):
                self._abort(stream.method, too_many(seats, "streams"), call)
            flow = self._lane(call) if is_one_at_a_time else self._pipeline()
            as_call = as_calls if is_one_at_a_time else None
            tasks = (partial(self._answer_on_stream, stream, body, call, peer, as_call) for body in bodies)
            self._flows.add(flow)
            try:
                yield from flow.answers(tasks)
            except Exception as error:  # noqa: BLE001  # as above
                self._abort(stream.method, error, call)
            finally:
                self._flows.discard(flow)
                seats.give_back(peer)

        return grpc.stream_stream_rpc_method_handler(handle, request_deserializer=Body)

    def _lane(self, call: grpc.ServicerContext) -> Lane:
        return Lane(self._refuse_when_draining, call.cancel)

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            self._stream_pool, self._admission, self._refuse_when_draining, lambda: self._linger_until
        )

    def _count_until_answered(self, call: grpc.ServicerContext) -> None:
        self._admission.begin()
        if not call.add_callback(self._admission.end):
            self._admission.end()  # at once, where the caller is gone

    def _answer(
        self, method: Method, body: Body, call: grpc.ServicerContext, place: Place, pack: Packing[T]
    ) -> T:
        with self._observed(method, len(body), call) as at_work:
            requests = [method.forms.read(body.take())]
            caller = Caller.of(call, place.peer, partial(self._admission.grow, place))
            # Handed over, so that the service can let go of it while it waits.
            answer = method.answer(requests.pop(), at_work.stages, caller)
            return at_work.packed(answer, pack)

    def _answer_on_stream(
        self,
        stream: StreamMethod,
        body: Body,
        call: grpc.ServicerContext,
        peer: str,
        as_call: ObservedMethod | None,
    ) -> bytes:
        method, size = stream.method, len(body)
        with self._observed(method, size, call, as_call) as at_work:
            mark, request = stream.read(body.take())
            try:
                _require_request(request)
                with self._admission.holding(peer, size) as place:
                    caller = Caller.of(call, peer, partial(self._admission.grow, place))
                    answer = envelope(mark, method.answer(request, at_work.stages, caller))
            except Exception as error:  # noqa: BLE001  # a refused request does not end its stream
                at_work.stages.end()
                refusal = _as_lossd_error(error)
                at_work.code = code_of(refusal)
                self._refusals.record(method.name, refusal, peer)
                answer = [stream.response(id=mark, error=stream_error(refusal)).SerializeToString()]
            return at_work.packed(answer, b"".join)

    def _observed(
        self,
        method: Method,
        size: int,
        call: grpc.ServicerContext,
        as_call: ObservedMethod | None = None,
    ) -> AtWork:
        """Counts a request of so many bytes, and its time by stage however it ends."""
        stages = Stages() if self._stages is None else self._stages(method.name, call)
        return AtWork(self._metrics.of(method.name), stages, self._home.away(size), size, as_call)

    def _abort(self, method: Method, error: Exception, call: grpc.ServicerContext) -> NoReturn:
        self._refusals.abort(method.name, _as_lossd_error(error), call)

    def _refuse_when_draining(self) -> None:
        if self._is_draining:
            raise UnavailableError(Reason.DRAINING, "the server is stopping")


def _require_request(request: Request[Any] | None) -> None:
    if request is None:
        raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field="request")


def _as_lossd_error(error: Exception) -> LossdError:
    """Returns what a caller may know of an exception; anything unforeseen stays in the log."""
    if isinstance(error, LossdError):
        return error
    _log.error("internal error", exc_info=error)
    return LossdError(Reason.INTERNAL, "a fault of the server; its log has the details")
