"""From messages to work: unpacks, checks everything, and names the field of whatever is wrong."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Buffer, Parcel
from lossd_server.engine import AssignItem, AssignJob, CustomLoss, LossItem, LossJob
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.losses import EvaluationOptions, LossModule
from lossd_server.losses.fcos_arguments import DENSE_TARGETS
from lossd_server.rpc.inputs import InputReader
from lossd_server.rpc.losses import assigner_of, loss_of
from lossd_server.rpc.outputs import read_outputs
from lossd_server.shared_memory import Regions, Slices
from lossd_server.targets import BYTES_OF_POSITIVE, FCOSAssigner

M = TypeVar("M", bound=Message)

MAX_ITEMS = 65_536
"""Most items of one request."""

GRADIENT_DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT64: torch.float64,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
}

_DENSE_BYTES_PER_LOCATION = 8 + 16 + 4 + 1
_FORMATS = set(pb.TargetFormat.values())
_SPARSE_FORMATS = {pb.TARGET_FORMAT_SPARSE, pb.TARGET_FORMAT_SMALLER}
_SPARSE_BYTES_PER_LOCATION = 4
"""What a location costs before a box is looked at, where none is a crowd region."""


def parse(message_type: type[M], data: Buffer) -> Parcel[M]:
    """Returns the message that bytes hold; raises `MALFORMED_REQUEST` when they hold none."""
    try:
        return Parcel.read(message_type, data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidInputError(
            Reason.MALFORMED_REQUEST, f"{len(data)} bytes are no {name}", length=len(data), type=name
        ) from error


def read_loss_job(
    parcel: Parcel[pb.ComputeLossRequest],
    custom_losses: Mapping[str, CustomLoss],
    regions: Regions | None = None,
) -> LossJob:
    """Returns the checked work of a request.

    Args:
        parcel: The request.
        custom_losses: The operator's losses by name.
        regions: The shared memory that it may name; None where its caller can have passed none.

    Raises:
        InvalidInputError: Whatever is wrong with it, by field path.
    """
    request = parcel.message
    kind = request.WhichOneof("loss")
    if kind is None:
        raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field="loss")
    _require_items(len(request.items))
    if kind == "custom":
        loss: LossModule | CustomLoss = _custom_loss(request.custom.name, custom_losses)
    else:
        loss = loss_of(kind, getattr(request, kind))
    options = _options(request, loss)
    slices = Slices(regions)
    predictions = loss.inputs if isinstance(loss, CustomLoss) else loss.differentiable
    reader = InputReader(parcel.payloads, slices, predictions)
    items = []
    for index, item in enumerate(request.items):
        read = _read_item(f"items[{index}]", item, kind, loss, options, reader)
        with errors_within(f"items[{index}]"):
            outputs = read_outputs(request, index, read.arguments, slices)
        items.append(read._replace(outputs=outputs) if outputs else read)
    slices.check_overlaps()
    return LossJob(loss=loss, items=items, strict=request.strict, owner=slices.owner())


def read_assign_job(
    parcel: Parcel[pb.AssignTargetsRequest], max_answer_bytes: int, regions: Regions | None = None
) -> AssignJob:
    """Returns the checked work of a request whose answer stays within a size; see `read_loss_job`.

    Raises:
        InvalidInputError: Whatever is wrong with it, by field path.
    """
    request, reader = parcel.message, InputReader(parcel.payloads, Slices(regions))
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
            items.append(_read_assign_item(f"items[{index}]", item, assigner, reader))
    locations = sum(item.location_count for item in items)
    _require_answer_size(items, locations, request.format, max_answer_bytes)
    return AssignJob(
        assigner=assigner,
        items=items,
        max_positives=_most_positives(locations, request.format, max_answer_bytes),
        answer_bytes=0 if request.format in _SPARSE_FORMATS else locations * _DENSE_BYTES_PER_LOCATION,
    )


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


def _read_item(
    path: str,
    item: pb.LossItem,
    kind: str,
    loss: LossModule | CustomLoss,
    options: EvaluationOptions,
    reader: InputReader,
) -> LossItem:
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
        inputs = getattr(item, kind)
        if isinstance(loss, CustomLoss):
            tensors = inputs.tensors
            arguments = {name: reader.tensor(f"tensors[{name}]", tensors[name], name) for name in tensors}
            loss.check(arguments, options.gradients)
            return LossItem(path=path, arguments=arguments, options=options)
        return LossItem(path=path, arguments=_read_arguments(inputs, loss, reader), options=options)


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


def _read_arguments(inputs: Message, loss: LossModule, reader: InputReader) -> Mapping[str, Any]:
    """Returns the tensors of an inputs message by field name, as the loss wants them."""
    arguments = {field.name: reader.field(inputs, field.name) for field in inputs.DESCRIPTOR.fields}
    for name in loss.required:
        if arguments[name] is None:
            raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field=name)
    if isinstance(inputs, losses_pb2.FCOSInputs):
        dense = any(arguments[name] for name in DENSE_TARGETS)
        arguments["ground_truth"] = arguments["ground_truth"] or (None if dense else [])
    return loss.prepare(arguments)


def _read_assign_item(
    path: str, item: pb.AssignItem, assigner: FCOSAssigner, reader: InputReader
) -> AssignItem:
    ground_truth = [
        reader.ground_truth(f"ground_truth[{i}]", objects) for i, objects in enumerate(item.ground_truth)
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
    return AssignItem(path=path, objects=assigner.read(ground_truth), levels=levels)


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


def _require_answer_size(items: list[AssignItem], locations: int, target_format: int, max_bytes: int) -> None:
    """Refuses a few bytes that ask for gigabytes."""
    if locations * _DENSE_BYTES_PER_LOCATION <= max_bytes:
        return
    crowded = any(image.iscrowd is not None for item in items for image in item.objects)
    sparse = target_format in _SPARSE_FORMATS and not crowded
    per_location = _SPARSE_BYTES_PER_LOCATION if sparse else _DENSE_BYTES_PER_LOCATION
    if locations * per_location > max_bytes:
        raise InvalidInputError(
            Reason.MESSAGE_TOO_LARGE,
            f"come to {locations} locations, at most {max_bytes // per_location} are answered in one call",
            field="items",
            value=locations,
            limit=max_bytes // per_location,
        )


def _most_positives(locations: int, target_format: int, max_bytes: int) -> int:
    """Returns how many positives the answer has room for."""
    sparse = max_bytes // BYTES_OF_POSITIVE
    dense_fits = locations * _DENSE_BYTES_PER_LOCATION <= max_bytes
    return max(locations, sparse) if dense_fits and target_format != pb.TARGET_FORMAT_SPARSE else sparse
