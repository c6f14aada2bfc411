"""The cases of the losses: the eager form, lossd, its module in an autograd program, and a copy."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossd_server.bench import inputs, reference
from lossd_server.bench.case import Case, CaseSpec, Outcome, Path, Workbench, copy_path, eager_call
from lossd_server.engine import BufferPool
from lossd_server.losses import (
    CenternessLoss,
    EvaluationOptions,
    FCOSLoss,
    FocalLoss,
    GIoULoss,
    LossModule,
)
from lossd_server.targets import DEFAULT_STRIDES, feature_sizes

_ROWS = 100_000
_HEAD_IMAGE = (800, 1024)
_HEAD_BATCH = 2
_BOXES_PER_IMAGE = 20


def loss_cases() -> list[CaseSpec]:
    """Returns the cases of the losses, small ones first."""
    focal = [
        CaseSpec(
            name=f"focal{'' if gradients else '-value'}-{size}",
            title=f"focal loss, {list(shape)}, {'value and gradient' if gradients else 'value only'}",
            build=partial(_focal, shape=shape, gradients=gradients),
            large=size not in {"S", "M"},
            needs_gpu=size in inputs.SHAPES_FOR_GPUS,
        )
        for gradients in (True, False)
        for size, shape in (inputs.SHAPES | inputs.SHAPES_FOR_GPUS).items()
    ]
    images, *one_image = inputs.SHAPES["L"]
    head = f"FCOS head, {_HEAD_IMAGE[0]}x{_HEAD_IMAGE[1]}, batch {_HEAD_BATCH}, 80 classes"
    return [
        *focal,
        CaseSpec(
            name="focal-images",
            title=f"focal loss, {images} images of {one_image}, one by one and together",
            build=_focal_images,
            large=True,
        ),
        CaseSpec(name="giou", title=f"GIoU loss, {_ROWS} boxes, value and gradient", build=_giou),
        CaseSpec(
            name="centerness",
            title=f"centerness loss, {_ROWS} rows, value and gradient",
            build=_centerness,
        ),
        CaseSpec(
            name="fcos-autotimm",
            title=f"{head}, dense targets, value and gradients",
            build=_fcos_autotimm,
        ),
        CaseSpec(
            name="fcos-documented",
            title=f"{head}, {_BOXES_PER_IMAGE} boxes an image, value and gradients",
            build=_fcos_documented,
        ),
    ]


def evaluate(
    loss: LossModule, arguments: Mapping[str, Any], *, gradients: bool, buffers: BufferPool | None = None
) -> Outcome:
    """Checks and evaluates as the engine does, and returns the value and the gradients, flat.

    Args:
        loss: The loss.
        arguments: What it is of.
        gradients: Whether they are wanted.
        buffers: Where they lie; None for memory of torch's.
    """
    return evaluate_prepared(loss, loss.prepare(arguments), gradients=gradients, buffers=buffers)


def evaluate_prepared(
    loss: LossModule, arguments: Mapping[str, Any], *, gradients: bool, buffers: BufferPool | None = None
) -> Outcome:
    """Does the same for arguments that were checked."""
    options = EvaluationOptions(
        gradients=loss.differentiable if gradients else (),
        allocate=None if buffers is None else buffers.allocate,
    )
    evaluation = loss.evaluate(arguments, options)
    flat: list[Tensor] = [evaluation.loss]
    for gradient in evaluation.gradients.values():
        flat.extend([gradient] if isinstance(gradient, Tensor) else gradient)
    return flat


def _focal(bench: Workbench, *, shape: Sequence[int], gradients: bool) -> Case:
    logits, labels = (tensor.to(bench.device) for tensor in inputs.logits_and_labels(shape))
    loss = FocalLoss()
    return _case(
        bench,
        lambda leaf: reference.focal_loss(leaf, labels),
        loss,
        {"inputs": logits, "targets": labels},
        [logits],
        lambda leaf: loss(leaf, labels),
        gradients=gradients,
    )


def _focal_images(bench: Workbench) -> Case:
    logits, labels = (tensor.to(bench.device) for tensor in inputs.logits_and_labels(inputs.SHAPES["L"]))
    loss = FocalLoss(reduction="sum")
    images = [
        {"inputs": image, "targets": classes}
        for image, classes in zip(logits.unsqueeze(1), labels.unsqueeze(1), strict=True)
    ]

    def one_by_one() -> None:
        for image in images:
            evaluate(loss, image, gradients=True, buffers=bench.buffers)

    def together() -> None:
        evaluate(loss, {"inputs": logits, "targets": labels}, gradients=True, buffers=bench.buffers)

    paths = (Path(name="one by one", call=one_by_one), Path(name="together", call=together))
    return Case(paths=(*paths, copy_path([logits])), base="one by one", is_local=True)


def _giou(bench: Workbench) -> Case:
    pred, target = (tensor.to(bench.device) for tensor in inputs.box_pairs(_ROWS))
    loss = GIoULoss()
    return _case(
        bench,
        lambda leaf: reference.giou_loss(leaf, target.to(leaf.dtype)),
        loss,
        {"pred_boxes": pred, "target_boxes": target},
        [pred],
        lambda leaf: loss(leaf, target),
    )


def _centerness(bench: Workbench) -> Case:
    pred, target = (tensor.to(bench.device) for tensor in inputs.centerness_pairs(_ROWS))
    loss = CenternessLoss()
    return _case(
        bench,
        lambda leaf: reference.centerness_loss(leaf, target.to(leaf.dtype)),
        loss,
        {"pred": pred, "target": target},
        [pred],
        lambda leaf: loss(leaf, target),
    )


def _fcos_autotimm(bench: Workbench) -> Case:
    preds, boxes, labels, sizes = _head(bench)
    targets = reference.assign_batch(boxes, labels, sizes)
    dense = dict(zip(("cls_targets", "reg_targets", "centerness_targets"), _columns(targets), strict=True))

    def eager(*leaves: Tensor) -> Tensor:
        kind = leaves[0].dtype
        typed = [reference.DenseTargets(t.cls, t.reg.to(kind), t.centerness.to(kind)) for t in targets]
        return reference.fcos_autotimm(_by_kind(leaves), typed)

    return _fcos_case(bench, eager, preds, dense)


def _fcos_documented(bench: Workbench) -> Case:
    preds, boxes, labels, _sizes = _head(bench)
    eager, targets = eager_documented(boxes, labels)
    return _fcos_case(bench, eager, preds, targets)


def eager_documented(
    boxes: Sequence[Tensor], labels: Sequence[Tensor]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Returns the eager form of a head's loss by its levels, one by one, and the ground truth by name."""

    def eager(*leaves: Tensor) -> Tensor:
        typed = [image.to(leaves[0].dtype) for image in boxes]
        return reference.fcos_documented(_by_kind(leaves), typed, labels)

    return eager, {"ground_truth": [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]}


def _fcos_case(
    bench: Workbench, eager: Callable[..., Tensor], preds: reference.Predictions, targets: Mapping[str, Any]
) -> Case:
    loss = FCOSLoss(inputs.CLASSES)
    named = dict(zip(loss.differentiable, preds, strict=True))

    def module(*leaves: Tensor) -> Tensor:
        total: Tensor = loss(*_by_kind(leaves), **targets)["loss"]
        return total

    flat = [level for kind in preds for level in kind]
    return _case(bench, eager, loss, {**named, **targets}, flat, module)


def _head(
    bench: Workbench,
) -> tuple[reference.Predictions, list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Returns predictions, boxes and labels of each image, and the sizes of the levels."""
    sizes = feature_sizes(_HEAD_IMAGE, DEFAULT_STRIDES)
    outputs = inputs.head_outputs(_HEAD_BATCH, sizes)
    preds = reference.Predictions(*([level.to(bench.device) for level in kind] for kind in outputs))
    images = [inputs.boxes_and_labels(_BOXES_PER_IMAGE, _HEAD_IMAGE, seed=10 + i) for i in range(_HEAD_BATCH)]
    boxes, labels = ([part.to(bench.device) for part in kind] for kind in zip(*images, strict=True))
    return preds, boxes, labels, sizes


def _case(
    bench: Workbench,
    eager: Callable[..., Tensor],
    loss: LossModule,
    arguments: Mapping[str, Any],
    differentiable: Sequence[Tensor],
    module: Callable[..., Tensor],
    *,
    gradients: bool = True,
) -> Case:
    """Returns the four paths to a loss.

    Args:
        bench: What cases share.
        eager: The plain form, of the differentiable tensors one by one.
        loss: The product's loss.
        arguments: What it evaluates.
        differentiable: The tensors that gradients are of; what `copy` copies.
        module: The product's `forward`, of the differentiable tensors one by one.
        gradients: Whether gradients are wanted; if not, `module` is left out.
    """
    run = partial(eager_call, inputs=differentiable, gradients=gradients)
    paths = [
        Path(name="eager", call=run(eager, dtype=torch.float32)),
        Path(
            name="lossd",
            call=partial(evaluate, loss, arguments, gradients=gradients, buffers=bench.buffers),
            gpu_call=partial(evaluate_prepared, loss, loss.prepare(arguments), gradients=gradients),
        ),
        Path(name="module", call=run(module, dtype=torch.float32)),
        copy_path(differentiable),
    ]
    if not gradients:
        paths = [path for path in paths if path.name != "module"]
    return Case(paths=tuple(paths), base="eager", oracle=run(eager, dtype=torch.float64), is_local=True)


def _columns(targets: Sequence[reference.DenseTargets]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*targets, strict=True)]


def _by_kind(flat: Sequence[Tensor]) -> reference.Predictions:
    """Returns three lists of levels from one row of tensors."""
    levels = len(flat) // 3
    return reference.Predictions(*(list(flat[i * levels : (i + 1) * levels]) for i in range(3)))
