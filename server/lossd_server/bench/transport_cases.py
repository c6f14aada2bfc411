"""The cases of the transports: the same focal loss in this process and in another."""

import collections
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import torch
from torch import Tensor

from lossd.chunks import LEAST_BYTES
from lossd.gpu_memory import GpuArray
from lossd.tensors import Array, pack, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.wire import Buffer, Parcel
from lossd.writing import message_field, placed, tags_of, tensor_field
from lossd_client import Client
from lossd_client import FCOSAssigner as AssignerConfig
from lossd_client import FocalLoss as FocalConfig
from lossd_server.bench import inputs, reference
from lossd_server.bench.bare_calls import bare_call, channel_to, open_echo
from lossd_server.bench.case import Case, CaseSpec, Outcome, Path, Workbench, copy_path, eager_call
from lossd_server.bench.child import ECHO, SINK, STOCK
from lossd_server.bench.loss_cases import evaluate
from lossd_server.engine import Engine, LossItem, LossJob
from lossd_server.engine.transfer import on_gpu
from lossd_server.losses import EvaluationOptions, FocalLoss, LossModule
from lossd_server.targets import FCOSAssigner

_COMPUTE_LOSS = "/lossd.v1.LossService/ComputeLoss"
_CALLS = 100
_IMAGE, _BOXES, _ECHO_BYTES = (800, 1333), 20, 1000
_WIRE_TYPES = ("bfloat16", "float16")

_NEVER = 3600.0
"""Seconds after which a call is made again: a client that may do so has no stream for small calls."""


def transport_cases() -> list[CaseSpec]:
    """Returns the cases of the transports, small ones first."""
    losses = [
        CaseSpec(
            name=f"rpc{'' if gradients else '-value'}-{size}",
            title=f"focal loss by call, {list(shape)}, {'value and gradient' if gradients else 'value only'}",
            build=partial(_transport, shape=shape, gradients=gradients),
            large=size == "L",
        )
        for gradients in (True, False)
        for size, shape in inputs.SHAPES.items()
    ]
    targets = CaseSpec(
        name="rpc-assign",
        title=f"sparse targets of {_BOXES} boxes by call, against an echo of {_ECHO_BYTES} bytes",
        build=_assign,
    )
    return [*losses, targets]


def stream_cases() -> list[CaseSpec]:
    """Returns the cases of many calls in a row."""
    return [
        CaseSpec(
            name=f"stream-M{'-shared' if shared else ''}",
            title=f"{_CALLS} focal losses by call, {list(inputs.SHAPES['M'])}, value and gradient"
            f"{', in shared memory' if shared else ''}",
            build=partial(_stream_or_calls, shared=shared),
            large=True,
        )
        for shared in (False, True)
    ]


def _stream_or_calls(bench: Workbench, *, shared: bool) -> Case:
    logits, labels = (tensor.numpy() for tensor in inputs.logits_and_labels(inputs.SHAPES["M"]))
    address = bench.child().unix_address if shared else bench.child().address
    client = bench.resources.enter_context(Client(address))
    apart = bench.resources.enter_context(Client(address, hedge_after=_NEVER))
    loss, items = FocalConfig(), [(logits, labels)] * _CALLS

    def calls(client: Client) -> None:
        for item in items:
            client.compute_loss(loss, *item, gradients=True)

    def stream() -> None:
        collections.deque(client.compute_loss_stream(loss, items, gradients=True), maxlen=0)

    paths = (
        Path(name="apart", call=partial(calls, apart)),
        Path(name="calls", call=partial(calls, client)),
        Path(name="stream", call=stream),
    )
    return Case(paths=paths, base="apart")


def _assign(bench: Workbench) -> Case:
    boxes, labels = (tensor.numpy() for tensor in inputs.boxes_and_labels(_BOXES, _IMAGE, seed=20))
    ground_truth, assigner = [{"boxes": boxes, "labels": labels}], FCOSAssigner()
    sizes = assigner.feature_sizes(_IMAGE)
    client = bench.resources.enter_context(Client(bench.child().address))

    def here() -> None:
        assigner.assign(ground_truth, sizes).sparse()

    def ask(client: Client) -> None:
        client.assign_targets(AssignerConfig(), ground_truth, image_size=_IMAGE, sparse=True)

    echoed = [torch.zeros(_ECHO_BYTES, dtype=torch.uint8)]
    paths = (
        Path(name="here", call=here),
        Path(name="rpc", call=partial(ask, client)),
        Path(name="apart", call=partial(ask, _apart(bench))),
        Path(name="bare", call=bare_call(bench, echoed, method=ECHO)),
        Path(name="open", call=open_echo(bench, echoed)),
    )
    return Case(paths=paths, base="bare")


def _transport(bench: Workbench, *, shape: Sequence[int], gradients: bool) -> Case:
    logits, labels = inputs.logits_and_labels(shape)
    here = {"inputs": logits.to(bench.device), "targets": labels.to(bench.device)}
    on_host = {"inputs": logits.numpy(), "targets": labels.numpy()}
    exact = eager_call(
        lambda leaf: reference.focal_loss(leaf, here["targets"]),
        [here["inputs"]],
        gradients=gradients,
        dtype=torch.float64,
    )
    return Case(
        paths=(
            Path(name="evaluate", call=partial(evaluate, FocalLoss(), here, gradients=gradients)),
            Path(name="engine", call=engine_call(bench, FocalLoss(), on_host, gradients=gradients)),
            *_gpu_paths(bench, logits, labels, gradients=gradients),
            Path(name="allocated", call=_allocated(bench, logits, labels, gradients=gradients)),
            Path(name="shared", call=_shared(bench, logits, labels, gradients=gradients)),
            Path(name="rpc", call=_rpc(bench, logits, labels, gradients=gradients)),
            *_apart_paths(bench, logits, labels, gradients=gradients),
            *_whole_paths(bench, logits, labels, gradients=gradients),
            *(
                Path(name=wire, call=_rpc(bench, logits, labels, gradients=gradients, wire_dtype=wire))
                for wire in _WIRE_TYPES
            ),
            Path(name="stock", call=_stock(bench, logits, labels, gradients=gradients)),
            Path(name="bare", call=bare_call(bench, [logits, labels], method=ECHO if gradients else SINK)),
            *_open_paths(bench, logits, labels, gradients=gradients),
            copy_path([logits]),
        ),
        base="bare",
        oracle=exact,
    )


def engine_call(
    bench: Workbench, loss: LossModule, arguments: Mapping[str, Any], *, gradients: bool
) -> Callable[[], Outcome]:
    """Returns a call of the engine with arrays on the host, as the service makes it."""
    engine = Engine(bench.device)
    options = EvaluationOptions(gradients=loss.differentiable if gradients else ())

    def compute() -> Outcome:
        item = LossItem(path="", arguments=loss.prepare(arguments), options=options)
        ((outcome,), _timing) = engine.compute(LossJob(loss=loss, items=[item]))
        return [outcome.loss, *(array for arrays in outcome.gradients.values() for array in arrays)]

    return compute


def _rpc(
    bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool, wire_dtype: str | None = None
) -> Callable[[], Outcome]:
    """Returns a call of the server in the child process, the tensors inline in the message."""
    client = bench.resources.enter_context(Client(bench.child().address))
    return _call(client, (logits.numpy(), labels.numpy()), gradients=gradients, wire_dtype=wire_dtype)


def _shared(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> Callable[[], Outcome]:
    """Returns the same call on one host: the client copies the tensors into shared memory."""
    client = bench.resources.enter_context(Client(bench.child().unix_address))
    return _call(client, (logits.numpy(), labels.numpy()), gradients=gradients)


def _allocated(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> Callable[[], Outcome]:
    """Returns the same call for tensors that were made in shared memory: nothing is copied."""
    client = bench.resources.enter_context(Client(bench.child().unix_address))
    arrays = [client.allocate(tensor.shape, tensor.numpy().dtype) for tensor in (logits, labels)]
    for array, tensor in zip(arrays, (logits, labels), strict=True):
        array[:] = tensor.numpy()
    return _call(client, arrays, gradients=gradients)


def _gpu_paths(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> list[Path]:
    """Returns the same call for logits on the server's GPU, which get their gradient there."""
    if bench.device.type != "cuda":
        return []
    client = bench.resources.enter_context(Client(bench.child().unix_address))
    there = client.allocate_on_gpu(logits.shape)
    if there is None:
        return []
    on_gpu(there).copy_(logits)
    return [Path(name="on GPU", call=_call(client, (there, labels.numpy()), gradients=gradients))]


def _call(
    client: Client, arrays: Sequence[Array | GpuArray], *, gradients: bool, wire_dtype: str | None = None
) -> Callable[[], Outcome]:
    config = FocalConfig()

    def compute() -> Outcome:
        result = client.compute_loss(config, *arrays, gradients=gradients, wire_dtype=wire_dtype)
        found = result.gradients.values()
        return [result.loss, *(on_gpu(each) if isinstance(each, GpuArray) else each for each in found)]

    return compute


def _apart(bench: Workbench) -> Client:
    """Returns a client whose small calls each begin and end, as all do over a channel of the caller's."""
    return Client(channel=channel_to(bench, bench.child().address))


def _apart_paths(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> list[Path]:
    """Returns the same call by itself, where the client has a stream for such."""
    if logits.nbytes >= LEAST_BYTES:
        return []
    call = _call(_apart(bench), (logits.numpy(), labels.numpy()), gradients=gradients)
    return [Path(name="apart", call=call)]


def _whole_paths(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> list[Path]:
    """Returns the same call in one message, where the client sends it in chunks."""
    if logits.nbytes < LEAST_BYTES:
        return []
    channel = channel_to(bench, bench.child().address)
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_COMPUTE_LOSS)

    def compute() -> Outcome:
        request = b"".join(_focal_pieces(logits, labels, gradients=gradients))
        return _outcome(Parcel.read(pb.ComputeLossResponse, call(request)))

    return [Path(name="whole", call=compute)]


def _stock(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> Callable[[], Outcome]:
    """Returns the same call with stock protobuf on both sides."""
    channel = channel_to(bench, bench.child().bare_address)
    call: grpc.UnaryUnaryMultiCallable[pb.ComputeLossRequest, pb.ComputeLossResponse] = channel.unary_unary(
        STOCK,
        request_serializer=pb.ComputeLossRequest.SerializeToString,
        response_deserializer=pb.ComputeLossResponse.FromString,
    )

    def compute() -> Outcome:
        return _outcome(Parcel(call(_focal_request(logits, labels, gradients=gradients))))

    return compute


def _focal_request(logits: Tensor, labels: Tensor, *, gradients: bool) -> pb.ComputeLossRequest:
    inputs = losses_pb2.FocalInputs(inputs=pack(logits.numpy()), targets=pack(labels.numpy()))
    request = _empty_request(gradients=gradients)
    request.items.append(pb.LossItem(focal=inputs))
    return request


def _focal_pieces(logits: Tensor, labels: Tensor, *, gradients: bool) -> list[Buffer]:
    """Returns the same request as lossd writes it."""
    tags = tags_of(losses_pb2.FocalInputs.DESCRIPTOR)
    inputs = [*tensor_field(tags["inputs"], logits.numpy()), *tensor_field(tags["targets"], labels.numpy())]
    item = message_field(tags_of(pb.LossItem.DESCRIPTOR)["focal"], inputs)
    items = message_field(tags_of(pb.ComputeLossRequest.DESCRIPTOR)["items"], item)
    return placed([_empty_request(gradients=gradients).SerializeToString(), *items])


def _empty_request(*, gradients: bool) -> pb.ComputeLossRequest:
    return pb.ComputeLossRequest(
        focal=FocalConfig().message(), gradients=FocalConfig.differentiable if gradients else ()
    )


def _outcome(answer: Parcel[pb.ComputeLossResponse]) -> Outcome:
    (result,) = answer.message.results
    gradients = (unpack(gradient.tensors[0], answer.payloads) for gradient in result.gradients)
    return [unpack(result.loss, answer.payloads), *gradients]


def _open_paths(bench: Workbench, logits: Tensor, labels: Tensor, *, gradients: bool) -> list[Path]:
    """Returns the same echo on a stream that is open already, where a client's small calls go on one."""
    if not gradients or logits.nbytes >= LEAST_BYTES:
        return []
    return [Path(name="open", call=open_echo(bench, [logits, labels]))]
