"""What both clients send: builds requests, and splits those that are too large."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from lossd.tensors import DTYPES, TensorError, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import Parcel
from lossd_client._arrays import as_array
from lossd_client._calls import Call
from lossd_client._configs import CustomLoss, FCOSAssigner, FCOSLoss, LossConfig
from lossd_client._errors import refused_here, too_large
from lossd_client._maps import DenseForm, dense_targets
from lossd_client._narrow import wire_type
from lossd_client._options import EvaluationOptions, Gradients
from lossd_client._packing import put_ground_truth
from lossd_client._results import LossResult, ServerInfo, read_loss_results, read_server_info
from lossd_client._storage import FLOAT_TYPES, Storage
from lossd_client._streams import Stream
from lossd_client._targets import DenseTargets, SparseTargets, read_targets
from lossd_client._wire_form import WireForm

SMALL_BYTES = 1 << 20
"""Every server reads at least this: smaller requests need not ask for its limit."""

WINDOW = 8
"""Items of a stream that are on their way unless the caller says otherwise."""

_ENVELOPE_BYTES = 16
"""Tag and length of an item in its request, rounded up."""


@dataclass(frozen=True, kw_only=True)
class LossBatch:
    """A batch of evaluations, to go out in one message or, where that is too large, in several.

    Attributes:
        kind: Name of the loss in the contract's `oneof`.
        parcel: All of it.
        storage: Where its tensors lie, and those of its answer.
        payload_bytes: What each item has beside the message, at most.
    """

    kind: str
    parcel: Parcel[pb.ComputeLossRequest]
    storage: Storage
    payload_bytes: Sequence[int]

    @property
    def is_small(self) -> bool:
        """Whether any server reads it in one message."""
        return self._whole.size <= SMALL_BYTES

    def calls(self, max_bytes: int | None) -> list[Call[list[LossResult]]]:
        """Returns the calls that evaluate it, in order.

        Args:
            max_bytes: What the server reads in one message; None for one call whatever its size.

        Raises:
            TooLargeError: One item alone is too large.
        """
        if max_bytes is None or self._whole.size <= max_bytes:
            return [self._whole]
        return [self._call(part, first) for first, part in self._parts(max_bytes)]

    @cached_property
    def _whole(self) -> Call[list[LossResult]]:
        return self._call(self.parcel.message, 0)

    def _call(self, request: pb.ComputeLossRequest, first_item: int) -> Call[list[LossResult]]:
        return Call(
            method="ComputeLoss",
            request=Parcel(request, self.storage),
            read=partial(read_loss_results, self.kind, self.storage, first_item),
            storage=self.storage,
            first_item=first_item,
            may_be_cut=True,
        )

    def _parts(self, max_bytes: int) -> Iterator[tuple[int, pb.ComputeLossRequest]]:
        """Yields requests of at most `max_bytes` that hold the same items, and where each begins."""
        request = self.parcel.message
        head = pb.ComputeLossRequest()
        head.CopyFrom(request)
        del head.items[:]
        room = max_bytes - head.ByteSize()
        part, used, first = pb.ComputeLossRequest(), 0, 0
        for index, (item, beside) in enumerate(zip(request.items, self.payload_bytes, strict=True)):
            # A stand-in is longer than what its payload adds to the lengths around it.
            size = item.ByteSize() + beside + _ENVELOPE_BYTES
            if size > room:
                raise too_large(f"items[{index}]", size, max_bytes)
            if part.items and used + size > room:
                yield first, part
                part, used, first = pb.ComputeLossRequest(), 0, index
            if not part.items:
                part.CopyFrom(head)
            part.items.append(item)
            used += size
        yield first, part


def loss_batch(
    loss: LossConfig,
    items: Iterable[Sequence[Any]],
    options: EvaluationOptions,
    normalizers: Sequence[float | None] | None,
    storage: Storage,
) -> LossBatch:
    """Returns a batch of evaluations, each given by its arguments in order."""
    storage.form = _wire_form(loss, options)
    request = pb.ComputeLossRequest(component_gradients=options.component_gradients, strict=options.strict)
    getattr(request, loss.kind).CopyFrom(loss.message())
    payload_bytes = []
    for index, arguments in enumerate(items):
        before = storage.size
        loss.write(request.items.add(), arguments, f"items[{index}].{loss.kind}", storage)
        payload_bytes.append(storage.size - before)
    if normalizers is not None:
        _set_normalizers(request, normalizers)
    request.gradients.extend(_gradient_names(loss, request, options.gradients))
    if storage.form.is_narrow:
        # Gradients of a mean are below what float16 holds.
        request.gradient_dtype = tensor_pb2.DATA_TYPE_BFLOAT16
    elif options.gradient_dtype is not None:
        request.gradient_dtype = _gradient_dtype(options.gradient_dtype)
    request.sparse_gradients = isinstance(loss, FCOSLoss) and bool(request.gradients)
    storage.add_outputs(request, loss.kind, loss.differentiable)
    return LossBatch(
        kind=loss.kind,
        parcel=Parcel(request, storage),
        storage=storage,
        payload_bytes=payload_bytes,
    )


def assign_call(
    assigner: FCOSAssigner, ground_truth: Sequence[Any], **settings: Any
) -> Call[DenseTargets | SparseTargets]:
    """Returns the call for the targets of a batch of images; settings as for `assign_request`."""
    storage = Storage(None)
    return Call(
        method="AssignTargets",
        request=assign_request(assigner, ground_truth, storage=storage, **settings),
        read=partial(_read_targets, storage=storage),
        storage=storage,
    )


def assign_request(
    assigner: FCOSAssigner,
    ground_truth: Sequence[Any],
    *,
    image_size: tuple[int, int] | None,
    feature_sizes: Sequence[tuple[int, int]] | None,
    sparse: bool,
    storage: Storage,
) -> Parcel[pb.AssignTargetsRequest]:
    """Returns the request for the targets of a batch of images of one size."""
    request = pb.AssignTargetsRequest(
        assigner=assigner.message(),
        format=pb.TARGET_FORMAT_SPARSE if sparse else pb.TARGET_FORMAT_SMALLER,
        narrow_integers=True,
    )
    item = request.items.add()
    put_ground_truth(ground_truth, "items[0]", item, storage)
    if image_size is not None:
        item.image_size.CopyFrom(_size(image_size))
    item.feature_sizes.extend(map(_size, feature_sizes or ()))
    if not sparse:
        crowds = (image.get("iscrowd") for image in ground_truth)
        has_crowd = any(crowd is not None and as_array(crowd).any() for crowd in crowds)
        storage.dense_form = DenseForm(batch_size=len(ground_truth), has_crowd=has_crowd)
    return Parcel(request, storage)


def loss_stream(
    loss: LossConfig,
    options: EvaluationOptions,
    normalizer: float | None,
    *,
    window: int,
    return_exceptions: bool,
) -> Stream[LossResult]:
    """Returns the stream of evaluations, each given by its arguments in order."""

    def make(arguments: Sequence[Any], storage: Storage) -> Parcel[pb.ComputeLossRequest]:
        return loss_batch(loss, [arguments], options, [normalizer], storage).parcel

    def read(answer: Parcel[pb.ComputeLossResponse], storage: Storage) -> LossResult:
        (result,) = read_loss_results(loss.kind, storage, 0, answer)
        return result

    return Stream(
        method="ComputeLoss", make=make, read=read, window=window, return_exceptions=return_exceptions
    )


def assign_stream(
    assigner: FCOSAssigner, *, window: int, return_exceptions: bool, **settings: Any
) -> Stream[DenseTargets | SparseTargets]:
    """Returns the stream of assignments, each given by its ground truth; settings as for `assign_request`."""
    return Stream(
        method="AssignTargets",
        make=lambda ground_truth, storage: assign_request(
            assigner, ground_truth, storage=storage, **settings
        ),
        read=_read_targets,
        window=window,
        return_exceptions=return_exceptions,
    )


def info_call() -> Call[ServerInfo]:
    """Returns the call that asks a server what it is."""
    return Call(
        method="GetServerInfo",
        request=Parcel(pb.GetServerInfoRequest()),
        read=read_server_info,
        storage=Storage(None),
    )


def _set_normalizers(request: pb.ComputeLossRequest, normalizers: Sequence[float | None]) -> None:
    if len(normalizers) != len(request.items):
        raise ValueError(f"normalizers has {len(normalizers)} entries, want {len(request.items)} as items")
    for item, normalizer in zip(request.items, normalizers, strict=True):
        if normalizer is not None:
            item.normalizer = normalizer


def _read_targets(answer: Parcel[pb.AssignTargetsResponse], storage: Storage) -> DenseTargets | SparseTargets:
    targets = read_targets(answer)
    if storage.dense_form is None or isinstance(targets, DenseTargets):
        return targets
    return dense_targets(targets, storage.dense_form)


def _wire_form(loss: LossConfig, options: EvaluationOptions) -> WireForm:
    dtype = wire_type(options.wire_dtype)
    if dtype is None:
        return WireForm()
    if isinstance(loss, CustomLoss):
        message = "does not go with a custom loss, which does not say what of its inputs are predictions"
        raise refused_here(pb.ERROR_REASON_UNEXPECTED_FIELD, message, field="wire_dtype", value=dtype.name)
    if options.gradient_dtype is None:
        return WireForm(dtype)
    wanted = _gradient_dtype(options.gradient_dtype)
    if wanted not in FLOAT_TYPES:
        name, reason = DTYPES[wanted].name, pb.ERROR_REASON_INVALID_OPTION
        raise refused_here(reason, f"is {name}, want a float type", field="gradient_dtype", value=name)
    return WireForm(dtype, DTYPES[wanted])


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
        return sorted(name for name, tensor in tensors.items() if tensor.dtype in FLOAT_TYPES)
    return loss.differentiable


def _size(size: tuple[int, int]) -> pb.Size:
    height, width = size
    return pb.Size(height=height, width=width)
