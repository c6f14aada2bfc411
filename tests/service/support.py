"""What these tests share: a server, good requests of every kind, and how a refusal is read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lossd.tensors import pack, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.v1.loss_service_pb2_grpc import LossServiceStub
from lossd_server import losses as local
from lossd_server.config import ServerConfig
from lossd_server.rpc import Server
from lossd_server.targets import FCOSAssigner

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float64": tensor_pb2.DATA_TYPE_FLOAT64,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16,
}


def make_server(**settings: Any) -> Server:
    """A server on free ports of the loopback; the CPU is where the local modules are evaluated too."""
    defaults = {"listen": ("127.0.0.1:0",), "metrics_port": 0, "device": "cpu", "drain_seconds": 1.0}
    return Server(ServerConfig(**{**defaults, **settings}))


@contextmanager
def connect(server: Server) -> Iterator[LossServiceStub]:
    """A raw stub of the first address of a server."""
    with grpc.insecure_channel(server.addresses[0]) as channel:
        yield LossServiceStub(channel)


def loss_request(
    config: Any, items: Sequence[Mapping[str, Any]], *, normalizer: float | None = None, **settings: Any
) -> pb.ComputeLossRequest:
    """A request of one loss for items given by their arrays."""
    kind = KINDS[type(config)]
    request = pb.ComputeLossRequest(**{kind: config}, **settings)
    for arrays in items:
        item = request.items.add(normalizer=normalizer)
        inputs = getattr(item, kind)
        inputs.SetInParent()
        for name, value in arrays.items():
            _set(inputs, name, value)
    return request


KINDS = {
    losses_pb2.FocalLoss: "focal",
    losses_pb2.GIoULoss: "giou",
    losses_pb2.CenternessLoss: "centerness",
    losses_pb2.FCOSLoss: "fcos",
    losses_pb2.CustomLoss: "custom",
}


def _set(inputs: Any, name: str, value: Any) -> None:
    if isinstance(inputs, losses_pb2.CustomInputs):
        inputs.tensors[name].CopyFrom(pack(value))
    elif name == "ground_truth":
        inputs.ground_truth.extend(map(objects, value))
    elif isinstance(value, list):
        getattr(inputs, name).extend(map(pack, value))
    else:
        getattr(inputs, name).CopyFrom(pack(value))


def objects(image: Mapping[str, Any]) -> losses_pb2.GroundTruth:
    """The message of one image's objects."""
    return losses_pb2.GroundTruth(**{name: pack(array) for name, array in image.items()})


def assign_request(
    ground_truth: Sequence[Mapping[str, Any]], size: tuple[int, int] = (64, 96), **settings: Any
) -> pb.AssignTargetsRequest:
    """A request of targets for one item of images of one size."""
    item = pb.AssignItem(
        ground_truth=list(map(objects, ground_truth)), image_size=pb.Size(height=size[0], width=size[1])
    )
    return pb.AssignTargetsRequest(items=[item], **settings)


def good_loss_request() -> pb.ComputeLossRequest:
    """A small request that must always succeed."""
    return loss_request(losses_pb2.FocalLoss(), [focal_arrays(np.random.default_rng(0), 3)])


def good_assign_request() -> pb.AssignTargetsRequest:
    """A small request that must always succeed."""
    return assign_request([scene(np.random.default_rng(0), (64, 96))])


CLASSES = 3
LEVELS = ((8, 12), (4, 6))
"""Level sizes of the heads below: those of an image of 64 x 96 at the strides 8 and 16."""
ASSIGNER = FCOSAssigner(strides=(8, 16), regress_ranges=((-1.0, 64.0), (64.0, 128.0)))


def floats(rng: np.random.Generator, shape: Sequence[int], scale: float = 3.0) -> np.ndarray:
    """Normal float32 numbers."""
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def focal_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Rows of logits, of which some are ignored."""
    return {"inputs": floats(rng, (n, 5)), "targets": rng.integers(-1, 5, n)}


def focal_grid_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """A map of logits, of which some are ignored."""
    labels = rng.integers(-1, CLASSES, (2, n, 7)).astype(np.int32)
    return {"inputs": floats(rng, (2, CLASSES, n, 7)), "targets": labels}


def boxes(rng: np.random.Generator, n: int, extent: float = 60.0) -> np.ndarray:
    """Upright boxes with some area."""
    low = rng.uniform(0, extent / 2, (n, 2))
    return np.concatenate([low, low + rng.uniform(4, extent / 2, (n, 2))], axis=1).astype(np.float32)


def giou_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Predicted and target boxes, weighted."""
    weights = rng.uniform(0.1, 2, n).astype(np.float32)
    return {"pred_boxes": boxes(rng, n), "target_boxes": boxes(rng, n), "weights": weights}


def centerness_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Logits and soft targets, weighted."""
    target, weights = rng.uniform(0, 1, (2, n, 1)).astype(np.float32)
    return {"pred": floats(rng, (n, 1)), "target": target, "weights": weights}


def scene(rng: np.random.Generator, size: tuple[int, int], n: int = 4) -> dict[str, np.ndarray]:
    """Objects of one image."""
    return {"boxes": boxes(rng, n, min(size)), "labels": rng.integers(0, CLASSES, n)}


def head(rng: np.random.Generator, n: int) -> dict[str, list[np.ndarray]]:
    """Outputs of an FCOS head for `n` images."""
    return {
        "cls_preds": [floats(rng, (n, CLASSES, *size)) for size in LEVELS],
        "reg_preds": [np.exp(floats(rng, (n, 4, *size), 1.0)) * 8 for size in LEVELS],
        "centerness_preds": [floats(rng, (n, 1, *size)) for size in LEVELS],
    }


def fcos_truth_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """A head and the ground truth of its images."""
    return {**head(rng, n), "ground_truth": [scene(rng, (64, 96)) for _ in range(n)]}


def fcos_dense_arrays(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """A head and dense targets for it."""
    levels = ASSIGNER.assign([scene(rng, (64, 96)) for _ in range(n)], LEVELS).dense()
    return {
        **head(rng, n),
        "cls_targets": [level.cls for level in levels],
        "reg_targets": [level.reg for level in levels],
        "centerness_targets": [level.centerness for level in levels],
    }


@dataclass(frozen=True)
class Case:
    """A loss as a message and as a module, and inputs for it."""

    config: Any
    module: local.LossModule
    arrays: Callable[[np.random.Generator, int], dict[str, Any]]


_WEIGHTS = {"cls_weight": 2.0, "reg_weight": 3.0, "centerness_weight": 0.3}
CASES = {
    "focal": Case(losses_pb2.FocalLoss(), local.FocalLoss(), focal_arrays),
    "focal-grid": Case(
        losses_pb2.FocalLoss(alpha=-1, gamma=0, reduction=losses_pb2.REDUCTION_SUM),
        local.FocalLoss(alpha=None, gamma=0, reduction="sum"),
        focal_grid_arrays,
    ),
    "focal-none": Case(
        losses_pb2.FocalLoss(alpha=0, gamma=1.5, reduction=losses_pb2.REDUCTION_NONE),
        local.FocalLoss(alpha=0.0, gamma=1.5, reduction="none"),
        focal_grid_arrays,
    ),
    "giou": Case(losses_pb2.GIoULoss(), local.GIoULoss(), giou_arrays),
    "giou-none": Case(
        losses_pb2.GIoULoss(reduction=losses_pb2.REDUCTION_NONE, eps=0.5),
        local.GIoULoss(reduction="none", eps=0.5),
        giou_arrays,
    ),
    "centerness": Case(losses_pb2.CenternessLoss(), local.CenternessLoss(), centerness_arrays),
    "centerness-sum": Case(
        losses_pb2.CenternessLoss(reduction=losses_pb2.REDUCTION_SUM),
        local.CenternessLoss(reduction="sum"),
        centerness_arrays,
    ),
    "fcos-dense": Case(
        losses_pb2.FCOSLoss(num_classes=CLASSES, **_WEIGHTS),
        local.FCOSLoss(CLASSES, **_WEIGHTS),
        fcos_dense_arrays,
    ),
    "fcos-truth": Case(
        losses_pb2.FCOSLoss(num_classes=CLASSES, **_WEIGHTS),
        local.FCOSLoss(CLASSES, **_WEIGHTS),
        fcos_truth_arrays,
    ),
}


def evaluate_locally(case: Case, arrays: Mapping[str, Any], **options: Any) -> local.Evaluation:
    """The same without any server."""
    with torch.no_grad():
        arguments = case.module.prepare({name: to_torch(value) for name, value in arrays.items()})
        return case.module.evaluate(arguments, local.EvaluationOptions(**options))


def to_torch(value: Any) -> Any:
    """Arrays, and arrays in lists, as tensors; ground truth as it is."""
    if isinstance(value, list):
        return [to_torch(entry) for entry in value]
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == BFLOAT16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())


def same_bits(tensor: tensor_pb2.Tensor, expected: torch.Tensor) -> bool:
    """Whether a message holds exactly the type, shape and bits of a tensor."""
    array = unpack(tensor)
    if array.dtype.name != str(expected.dtype).removeprefix("torch."):
        return False
    same_shape = array.shape == tuple(expected.shape)
    expected = expected.contiguous().view(-1) if same_shape else expected
    return same_shape and array.tobytes() == bytes(expected.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Refusal:
    """What a call was refused with."""

    code: grpc.StatusCode
    message: str
    domain: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[str, ...] = ()
    retry_seconds: float | None = None


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Reads the `google.rpc.Status` of a failed call."""
    status = rpc_status.from_call(error)
    found: dict[str, Any] = {}
    for detail in status.details if status else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    info = found.get("ErrorInfo", error_details_pb2.ErrorInfo())
    bad = found.get("BadRequest", error_details_pb2.BadRequest())
    retry = found.get("RetryInfo")
    return Refusal(
        code=error.code(),
        message=error.details(),
        domain=info.domain,
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(violation.field for violation in bad.field_violations),
        retry_seconds=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def refusal(call: Callable[..., Any], *arguments: Any) -> Refusal:
    """Makes a call that must be refused and reads why."""
    try:
        call(*arguments)
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was answered")
