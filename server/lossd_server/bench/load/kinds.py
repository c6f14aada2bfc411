"""The kinds of call: their requests as bytes, made once before anyone calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

import numpy as np

from lossd.tensors import Array, pack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd_server.scenes import NUM_CLASSES, Scene, make_scenes

ECHO_METHOD = "/lossd.bench.Load/Echo"
"""Of a bare server: it answers as lossd answers `assign`, and does nothing for it."""

STREAM_WINDOW = 4
"""Requests of a stream that are on their way at a time: as many as the server works on."""

SHAPES = {"s": (1, 80, 13, 13), "m": (2, 80, 100, 100), "l": (16, 80, 100, 100)}
"""Logits of 54 kB, 6.4 MB and 51.2 MB."""

_IMAGE = (800, 1333)
_HEAD_SIZES = ((100, 128), (50, 64), (25, 32), (13, 16), (7, 8))
"""Levels of an image of 800 × 1024 at the strides 8 to 128."""


class Form(Enum):
    """How a kind is called."""

    UNARY = auto()
    """One request, one answer, through the raw stub: bytes go out as they lie."""
    STREAM = auto()
    """Many requests on one stream, likewise."""
    SHARED = auto()
    """Through `Client` over the Unix socket, with tensors made in shared memory."""
    BARE = auto()
    """A server beside lossd that answers the same bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of call.

    Attributes:
        title: What is asked for, in words.
        form: How it is called.
        method: Its path.
        request: Makes the request: a message, or logits and labels for `SHARED`.
    """

    title: str
    form: Form
    method: str
    request: Callable[[], Any]


def focal_arrays(size: str) -> tuple[Array, Array]:
    """Returns logits `[B, 80, H, W]`, mostly negative as those of a head, and labels, a few of them -1."""
    rng = np.random.default_rng(1)
    batch, classes, height, width = SHAPES[size]
    logits = rng.standard_normal(SHAPES[size], np.float32) * 2 - 2
    return logits, rng.integers(-1, classes, (batch, height, width), np.int32)


def _focal(size: str) -> pb.ComputeLossRequest:
    logits, labels = focal_arrays(size)
    inputs = losses_pb2.FocalInputs(inputs=pack(logits), targets=pack(labels))
    return pb.ComputeLossRequest(
        focal=losses_pb2.FocalLoss(), items=[pb.LossItem(focal=inputs)], gradients=["inputs"]
    )


def _bad() -> pb.ComputeLossRequest:
    request = _focal("s")
    labels = np.full((1, 13, 13), NUM_CLASSES, np.int32)
    request.items[0].focal.targets.CopyFrom(pack(labels))
    return request


def _giou(count: int) -> pb.ComputeLossRequest:
    boxes = _objects(count)["boxes"]
    shifted = boxes + np.random.default_rng(2).normal(0, 4, (count, 1)).astype(np.float32)
    inputs = losses_pb2.GIoUInputs(pred_boxes=pack(shifted), target_boxes=pack(boxes))
    return pb.ComputeLossRequest(
        giou=losses_pb2.GIoULoss(), items=[pb.LossItem(giou=inputs)], gradients=["pred_boxes"]
    )


def _fcos(images: int) -> pb.ComputeLossRequest:
    rng = np.random.default_rng(5)

    def levels(channels: int, scale: float, offset: float) -> list[Any]:
        sizes = [(images, channels, *size) for size in _HEAD_SIZES]
        return [pack(abs(rng.standard_normal(size, np.float32)) * scale + offset) for size in sizes]

    inputs = losses_pb2.FCOSInputs(
        cls_preds=levels(NUM_CLASSES, 2, -5),
        reg_preds=levels(4, 40, 8),
        centerness_preds=levels(1, 1, 0),
        ground_truth=[_truth(scene) for scene in make_scenes(images, (800, 1024))],
    )
    names = ["cls_preds", "reg_preds", "centerness_preds"]
    return pb.ComputeLossRequest(
        fcos=losses_pb2.FCOSLoss(num_classes=NUM_CLASSES),
        items=[pb.LossItem(fcos=inputs)],
        gradients=names,
        sparse_gradients=True,
    )


def _assign(boxes: int) -> pb.AssignTargetsRequest:
    height, width = _IMAGE
    item = pb.AssignItem(
        ground_truth=[_truth(_objects(boxes))], image_size=pb.Size(height=height, width=width)
    )
    return pb.AssignTargetsRequest(items=[item], format=pb.TARGET_FORMAT_SPARSE, narrow_integers=True)


def _objects(count: int) -> Scene:
    """Returns as many objects as that, of some scenes, as one image's."""
    scenes: list[Scene] = make_scenes(count // 3 + 1, _IMAGE)
    return {key: np.concatenate([scene[key] for scene in scenes])[:count] for key in ("boxes", "labels")}


def _truth(scene: Scene) -> losses_pb2.GroundTruth:
    return losses_pb2.GroundTruth(boxes=pack(scene["boxes"]), labels=pack(scene["labels"].astype(np.int32)))


_SERVICE = "/lossd.v1.LossService"


def _kinds() -> dict[str, Kind]:
    kinds = {"assign": _call("AssignTargets", "targets of 20 boxes", partial(_assign, 20))}
    kinds["assign-crowd"] = _call("AssignTargets", "targets of 10,000 boxes", partial(_assign, 10_000))
    for size, shape in SHAPES.items():
        title = f"focal loss and gradient, {list(shape)}"
        kinds[f"focal-{size}"] = _call("ComputeLoss", title, partial(_focal, size))
    kinds["giou"] = _call("ComputeLoss", "GIoU and gradient, 10,000 boxes", partial(_giou, 10_000))
    kinds["fcos"] = _call("ComputeLoss", "FCOS head at 800×1024, batch 2", partial(_fcos, 2))
    kinds["bad"] = _call("ComputeLoss", "a label out of range, to be refused", _bad)
    for name in ("assign", "focal-s", "focal-m"):
        kinds[f"stream-{name.removeprefix('focal-')}"] = _streamed(kinds[name])
    for size in ("m", "l"):
        title = f"focal loss and gradient in shared memory, {list(SHAPES[size])}"
        kinds[f"shared-{size}"] = Kind(
            title=title, form=Form.SHARED, method="ComputeLoss", request=partial(focal_arrays, size)
        )
    kinds["echo"] = Kind(
        title="a bare answer of the bytes of assign",
        form=Form.BARE,
        method=ECHO_METHOD,
        request=partial(_assign, 20),
    )
    return kinds


def _call(method: str, title: str, request: Callable[[], Any]) -> Kind:
    return Kind(title=title, form=Form.UNARY, method=f"{_SERVICE}/{method}", request=request)


def _streamed(kind: Kind) -> Kind:
    title, method = f"{kind.title}, on a stream", f"{kind.method}Stream"
    return Kind(title=title, form=Form.STREAM, method=method, request=kind.request)


KINDS = _kinds()
"""Every kind, by name."""


def payloads(kind: Kind) -> Sequence[bytes]:
    """Returns the request of a kind as bytes; for a stream one for each place in its window, from 1 on."""
    request = kind.request()
    if kind.form != Form.STREAM:
        return [request.SerializeToString()]
    envelope: Any = pb.ComputeLossStreamRequest
    if isinstance(request, pb.AssignTargetsRequest):
        envelope = pb.AssignTargetsStreamRequest
    return [envelope(id=1 + i, request=request).SerializeToString() for i in range(STREAM_WINDOW)]
