"""A lossd server in a process of its own, beside bare gRPC handlers and one with stock protobuf."""

import json
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from subprocess import Popen

import grpc
import numpy as np
import structlog

from lossd.channel_options import server_options
from lossd.tensors import Array, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd_server.bench import process
from lossd_server.config import ServerConfig
from lossd_server.engine import Engine, keep_freed_memory, resolve_device
from lossd_server.losses import LossOutcome
from lossd_server.rpc import Server, decode
from lossd_server.rpc.forms import Request

ECHO = "/lossd.bench.Bare/Echo"
"""Answers with the bytes that it was sent."""
ECHO_STREAM = "/lossd.bench.Bare/EchoStream"
"""The same for each message of a stream."""
SINK = "/lossd.bench.Bare/Sink"
"""Answers with nothing."""
STOCK = "/lossd.bench.Bare/Stock"
"""`ComputeLoss` with no codec but protobuf's own."""

_BARE_THREADS = 8
"""One for a call at a time, and one for each stream that a case leaves open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """The child process.

    Attributes:
        process: Its handle.
        address: Where lossd listens.
        unix_address: The same on a Unix socket, where it shares memory.
        bare_address: Where the other handlers listen.
    """

    process: Popen[str]
    address: str
    unix_address: str
    bare_address: str

    @classmethod
    def start(cls, device: str) -> "Child":
        """Starts the child and waits until it listens.

        Raises:
            LossdError: It ended before.
        """
        child, line = process.start(__name__, device)
        return cls(process=child, **json.loads(line))

    def stop(self) -> None:
        """Ends the child."""
        process.stop(self.process)


def main(device: str) -> None:
    """Serves until standard input ends, which it also does when the parent is gone."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        listen = ("127.0.0.1:0", f"unix:{directory}/lossd.sock")
        _serve(ServerConfig(listen=listen, metrics_port=None, device=device, drain_seconds=1))


def _serve(config: ServerConfig) -> None:
    bare = grpc.server(ThreadPoolExecutor(_BARE_THREADS), options=server_options(config.max_message_bytes))
    bare.add_generic_rpc_handlers((_Bare(Engine(resolve_device(config.device))),))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    with Server(config) as server:
        address, unix_address = server.addresses
        addresses = {
            "address": address,
            "unix_address": unix_address,
            "bare_address": f"127.0.0.1:{port}",
        }
        process.listening(json.dumps(addresses))
    bare.stop(0).wait()


class _Bare(grpc.GenericRpcHandler):
    """Handlers that see the very bytes; without a codec of ours."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        if handler_call_details.method == ECHO_STREAM:
            return grpc.stream_stream_rpc_method_handler(lambda requests, _call: requests)
        answers = {ECHO: lambda data, _call: data, SINK: lambda _data, _call: b"", STOCK: self._stock}
        answer = answers.get(handler_call_details.method)
        return None if answer is None else grpc.unary_unary_rpc_method_handler(answer)

    def _stock(self, data: bytes, _call: grpc.ServicerContext) -> bytes:
        request = pb.ComputeLossRequest.FromString(data)
        job = decode.read_loss_job(Request(request), self._engine.custom_losses)
        outcomes, _timing = self._engine.compute(job)
        response = pb.ComputeLossResponse()
        for outcome in outcomes:
            _write_result(outcome, response.results.add())
        return response.SerializeToString()


def _write_result(outcome: LossOutcome, result: pb.LossResult) -> None:
    """Writes a focal loss as stock protobuf does it best: a tensor that is put in later is copied."""
    _write_tensor(outcome.loss, result.loss)
    for name, arrays in outcome.gradients.items():
        gradient = result.gradients.add(input=name)
        for array in arrays:
            if isinstance(array, np.ndarray):
                _write_tensor(array, gradient.tensors.add())
    result.positive_count = outcome.positive_count
    for level in outcome.raw_sums:
        numbers = {name: int(v) if name.endswith("_count") else v for name, v in level.items()}
        result.raw_sums.add(**numbers)
    result.preset = losses_pb2.LOSS_PRESET_AUTOTIMM


def _write_tensor(array: Array, tensor: tensor_pb2.Tensor) -> None:
    tensor.dtype = data_type_of(array.dtype)
    tensor.shape.extend(array.shape)
    tensor.inline = array.tobytes()
