"""What a request asks for, as far as that can be told before its tensors are looked at."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd_server.engine import CustomLoss
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.losses import EvaluationOptions, LossModule
from lossd_server.losses.fcos_arguments import DENSE_TARGETS
from lossd_server.rpc.losses import assigner_of, loss_of
from lossd_server.rpc.sources import source_of, sources_of_ground_truth, sources_of_inputs
from lossd_server.targets import FCOSAssigner, GroundTruth
from lossd_server.targets.pyramid import Pyramid

MAX_ITEMS = 65_536
"""Most items of one request."""

GRADIENT_DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT64: torch.float64,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
}

_FORMATS = set(pb.TargetFormat.values())


class PlannedEvaluation(NamedTuple):
    """An item of a `ComputeLossRequest`.

    Attributes:
        path: Where it stands, e.g. `items[3].focal`.
        sources: Its arguments, with a `Source` in place of every array.
        options: What is wanted beside the value.
        has_outputs: Whether the request says where gradients are to be written.
    """

    path: str
    sources: Mapping[str, Any]
    options: EvaluationOptions
    has_outputs: bool


class LossPlan(NamedTuple):
    """A `ComputeLossRequest`: the loss, the evaluations, and whether NaN and infinity are refused."""

    loss: LossModule | CustomLoss
    items: list[PlannedEvaluation]
    strict: bool


class PlannedAssignment(NamedTuple):
    """An item of an `AssignTargetsRequest`: where it stands, the objects of each image, and the locations."""

    path: str
    sources: list[GroundTruth]
    levels: Pyramid


class AssignPlan(NamedTuple):
    """An `AssignTargetsRequest`: the assigner, and the assignments."""

    assigner: FCOSAssigner
    items: list[PlannedAssignment]


def plan_loss(request: pb.ComputeLossRequest, custom_losses: Mapping[str, CustomLoss]) -> LossPlan:
    """Returns what a request asks for.

    Args:
        request: The request; what its tensors hold is not looked at.
        custom_losses: The operator's losses by name.

    Raises:
        InvalidInputError: Whatever is wrong with it so far, by field path.
    """
    kind = request.WhichOneof("loss")
    if kind is None:
        raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field="loss")
    _require_items(len(request.items))
    if kind == "custom":
        loss: LossModule | CustomLoss = _custom_loss(request.custom.name, custom_losses)
    else:
        loss = loss_of(kind, getattr(request, kind))
    options = _options(request, loss)
    items = [
        _plan_evaluation(f"items[{index}]", item, kind, loss, options)
        for index, item in enumerate(request.items)
    ]
    return LossPlan(loss=loss, items=items, strict=request.strict)


def plan_assignment(request: pb.AssignTargetsRequest) -> AssignPlan:
    """Returns what a request asks for; see `plan_loss`."""
    _require_items(len(request.items))
    if request.format not in _FORMATS:
        raise InvalidInputError(
            Reason.INVALID_OPTION,
            f"is {request.format}, which is unknown",
            field="format",
            value=request.format,
        )
    with errors_within("assigner"):
        assigner = assigner_of(request.assigner)
    items = []
    for index, item in enumerate(request.items):
        with errors_within(f"items[{index}]"):
            items.append(_plan_assignment(f"items[{index}]", item, assigner))
    return AssignPlan(assigner=assigner, items=items)


def _custom_loss(name: str, custom_losses: Mapping[str, CustomLoss]) -> CustomLoss:
    if name not in custom_losses:
        loaded = ", ".join(sorted(custom_losses)) or "none"
        raise InvalidInputError(
            Reason.UNKNOWN_CUSTOM_LOSS,
            f"is {name!r}, loaded are: {loaded}",
            field="custom.name",
            value=name,
            loaded=loaded,
        )
    return custom_losses[name]


def _options(request: pb.ComputeLossRequest, loss: LossModule | CustomLoss) -> EvaluationOptions:
    allowed = loss.inputs if isinstance(loss, CustomLoss) else loss.differentiable
    for index, name in enumerate(request.gradients):
        if name not in allowed:
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"is {name!r}, want one of {', '.join(allowed)}",
                field=f"gradients[{index}]",
                value=name,
                allowed=", ".join(allowed),
            )
    if request.gradient_dtype and request.gradient_dtype not in GRADIENT_DTYPES:
        raise InvalidInputError(
            Reason.INVALID_OPTION,
            f"is {request.gradient_dtype}, want a float type",
            field="gradient_dtype",
            value=request.gradient_dtype,
        )
    if isinstance(loss, CustomLoss) and request.component_gradients:
        raise InvalidInputError(
            Reason.UNEXPECTED_FIELD, "a custom loss has no such gradients", field="component_gradients"
        )
    return EvaluationOptions(
        gradients=tuple(dict.fromkeys(request.gradients)),
        gradient_dtype=GRADIENT_DTYPES.get(request.gradient_dtype),
        component_gradients=request.component_gradients,
        nonzero_rows=request.sparse_gradients,
    )


def _plan_evaluation(
    path: str,
    item: pb.LossItem,
    kind: str,
    loss: LossModule | CustomLoss,
    options: EvaluationOptions,
) -> PlannedEvaluation:
    with errors_within(path):
        given = item.WhichOneof("inputs")
        if given != kind:
            raise InvalidInputError(
                Reason.MISSING_FIELD if given is None else Reason.UNEXPECTED_FIELD,
                f"inputs are {given}, but the loss is {kind}",
                field=given or kind,
                value=given,
                loss=kind,
            )
        options = _with_normalizer(options, item, loss)
    path = f"{path}.{kind}"
    with errors_within(path):
        sources = _sources(getattr(item, kind), loss)
    return PlannedEvaluation(path=path, sources=sources, options=options, has_outputs=bool(item.outputs))


def _with_normalizer(
    options: EvaluationOptions, item: pb.LossItem, loss: LossModule | CustomLoss
) -> EvaluationOptions:
    if not item.HasField("normalizer"):
        return options
    if isinstance(loss, CustomLoss):
        raise InvalidInputError(
            Reason.UNEXPECTED_FIELD, "a custom loss does its own division", field="normalizer"
        )
    loss.check_normalizer(item.normalizer)
    return options._replace(normalizer=item.normalizer)


def _sources(inputs: Any, loss: LossModule | CustomLoss) -> Mapping[str, Any]:
    """Returns the sources of an item's arguments, by name, as the loss wants them."""
    if isinstance(loss, CustomLoss):
        tensors = inputs.tensors
        return {name: source_of(f"tensors[{name}]", tensors[name], name) for name in tensors}
    sources = sources_of_inputs(inputs)
    for name in loss.required:
        if sources[name] is None:
            raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field=name)
    if isinstance(inputs, losses_pb2.FCOSInputs):
        dense = any(sources[name] for name in DENSE_TARGETS)
        sources["ground_truth"] = sources["ground_truth"] or (None if dense else [])
    return sources


def _plan_assignment(path: str, item: pb.AssignItem, assigner: FCOSAssigner) -> PlannedAssignment:
    sources = [
        sources_of_ground_truth(f"ground_truth[{i}]", objects) for i, objects in enumerate(item.ground_truth)
    ]
    if item.HasField("image_size") == bool(item.feature_sizes):
        given = "both are" if item.feature_sizes else "neither is"
        raise InvalidInputError(
            Reason.MISSING_FIELD if given == "neither is" else Reason.UNEXPECTED_FIELD,
            f"want this or feature_sizes, {given} set",
            field="image_size",
        )
    sizes = [(size.height, size.width) for size in item.feature_sizes]
    if not sizes:
        size = item.image_size
        _require_size("image_size", size)
        sizes = assigner.feature_sizes((size.height, size.width))
    levels = assigner.pyramid_of(sizes, field="feature_sizes" if item.feature_sizes else "image_size")
    return PlannedAssignment(path=path, sources=sources, levels=levels)


def _require_size(field: str, size: pb.Size) -> None:
    for name in ("height", "width"):
        if getattr(size, name) < 0:
            raise InvalidInputError(
                Reason.VALUE_OUT_OF_RANGE,
                f"is {getattr(size, name)}, want at least 0",
                field=f"{field}.{name}",
                value=getattr(size, name),
            )


def _require_items(count: int) -> None:
    if not 1 <= count <= MAX_ITEMS:
        raise InvalidInputError(
            Reason.MISSING_FIELD if count == 0 else Reason.VALUE_OUT_OF_RANGE,
            f"has {count} entries, want 1..{MAX_ITEMS}",
            field="items",
            value=count,
            limit=MAX_ITEMS,
        )
