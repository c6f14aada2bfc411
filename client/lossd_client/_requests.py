"""What both clients send: builds requests, and splits those that are too large."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lossd.tensors import TensorError, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd_client._configs import CustomLoss, FCOSAssigner, LossConfig
from lossd_client._errors import refused_here
from lossd_client._packing import packed_ground_truth

SMALL_BYTES = 1 << 20
"""Every server reads at least this: smaller requests need not ask for its limit."""

_ENVELOPE_BYTES = 16
"""Tag and length of an item in its request, rounded up."""

_FLOAT_TYPES = {data_type_of(np.dtype(name)) for name in ("f2", "f4", "f8", ml_dtypes.bfloat16)}
"""The types that an input with a gradient may have."""

Gradients = bool | str | Sequence[str]
"""True for all, or the name or names of the inputs whose gradient is wanted."""


def loss_request(
    loss: LossConfig,
    items: Iterable[Sequence[Any]],
    *,
    gradients: Gradients,
    gradient_dtype: Any,
    component_gradients: bool,
    normalizers: Sequence[float | None] | None,
    strict: bool,
) -> pb.ComputeLossRequest:
    """Returns the request for a batch of evaluations, each given by its arguments in order."""
    request = pb.ComputeLossRequest(component_gradients=component_gradients, strict=strict)
    getattr(request, loss.kind).CopyFrom(loss.message())
    for index, arguments in enumerate(items):
        request.items.append(loss.item(arguments, f"items[{index}].{loss.kind}"))
    if normalizers is not None:
        _set_normalizers(request, normalizers)
    request.gradients.extend(_gradient_names(loss, request, gradients))
    if gradient_dtype is not None:
        request.gradient_dtype = _gradient_dtype(gradient_dtype)
    return request


def assign_request(
    assigner: FCOSAssigner,
    ground_truth: Sequence[Any],
    *,
    image_size: tuple[int, int] | None,
    feature_sizes: Sequence[tuple[int, int]] | None,
    sparse: bool,
) -> pb.AssignTargetsRequest:
    """Returns the request for the targets of a batch of images of one size."""
    item = pb.AssignItem(ground_truth=packed_ground_truth(ground_truth, "items[0]"))
    if image_size is not None:
        item.image_size.CopyFrom(_size(image_size))
    item.feature_sizes.extend(map(_size, feature_sizes or ()))
    return pb.AssignTargetsRequest(
        assigner=assigner.message(),
        items=[item],
        format=pb.TARGET_FORMAT_SPARSE if sparse else pb.TARGET_FORMAT_DENSE,
    )


def split(request: pb.ComputeLossRequest, max_bytes: int) -> Iterator[tuple[int, pb.ComputeLossRequest]]:
    """Yields requests of at most `max_bytes` that hold the same items, each with its first item's place.

    Raises:
        TooLargeError: One item alone is too large.
    """
    head = pb.ComputeLossRequest()
    head.CopyFrom(pb.ComputeLossRequest(gradients=request.gradients))
    for field, value in request.ListFields():
        if field.name not in {"items", "gradients"}:
            target = getattr(head, field.name)
            target.CopyFrom(value) if field.message_type else setattr(head, field.name, value)
    room = max_bytes - head.ByteSize()
    part, used, first = pb.ComputeLossRequest(), 0, 0
    for index, item in enumerate(request.items):
        size = item.ByteSize() + _ENVELOPE_BYTES
        if size > room:
            raise refused_here(
                pb.ERROR_REASON_MESSAGE_TOO_LARGE,
                f"is {size} bytes, the server reads {max_bytes} in one message",
                field=f"items[{index}]",
                value=size,
                limit=max_bytes,
            )
        if part.items and used + size > room:
            yield first, part
            part, used, first = pb.ComputeLossRequest(), 0, index
        if not part.items:
            part.CopyFrom(head)
        part.items.append(item)
        used += size
    yield first, part


def _set_normalizers(request: pb.ComputeLossRequest, normalizers: Sequence[float | None]) -> None:
    if len(normalizers) != len(request.items):
        raise ValueError(f"normalizers has {len(normalizers)} entries, want {len(request.items)} as items")
    for item, normalizer in zip(request.items, normalizers, strict=True):
        if normalizer is not None:
            item.normalizer = normalizer


def _gradient_dtype(dtype: Any) -> Any:
    try:
        return data_type_of(np.dtype(dtype))
    except TensorError as error:
        reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
        raise refused_here(reason, str(error), field="gradient_dtype", **error.values) from error


def _gradient_names(loss: LossConfig, request: pb.ComputeLossRequest, gradients: Gradients) -> Sequence[str]:
    if isinstance(gradients, str):
        return [gradients]
    if not isinstance(gradients, bool):
        return list(gradients)
    if not gradients:
        return []
    if isinstance(loss, CustomLoss):
        tensors = request.items[0].custom.tensors if request.items else {}
        return sorted(name for name, tensor in tensors.items() if tensor.dtype in _FLOAT_TYPES)
    return loss.differentiable


def _size(size: tuple[int, int]) -> pb.Size:
    height, width = size
    return pb.Size(height=height, width=width)
