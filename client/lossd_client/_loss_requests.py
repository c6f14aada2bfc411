"""What both clients send of losses: builds requests, and splits those that are too large."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from lossd.chunks import LEAST_BYTES
from lossd.tensors import DTYPES
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import tensor_pb2
from lossd.wire import LARGE_BYTES, Parcel
from lossd.writing import Piece, message_field, size_of, tags_of
from lossd_client._arrays import Array, host_arrays
from lossd_client._calls import SMALL_BYTES, Call
from lossd_client._config import LossConfig
from lossd_client._configs import CenternessLoss, CustomLoss, FocalLoss, GIoULoss
from lossd_client._errors import refused_here, too_large
from lossd_client._fcos_configs import FCOSLoss
from lossd_client._heads import config_field, gradient_dtype_of, gradient_names, output_fields, wanted_fields
from lossd_client._layouts import CallLayout, layout_of_call, shared_answer
from lossd_client._narrow import wire_type
from lossd_client._options import EvaluationOptions, Gradients
from lossd_client._results import LossResult, read_loss_results
from lossd_client._storage import FLOAT_TYPES, Output, Storage
from lossd_client._storage import LEAST_BYTES as SHARED_BYTES
from lossd_client._streams import Stream
from lossd_client._wire_form import Layout, WireForm

_ITEM = tags_of(pb.ComputeLossRequest.DESCRIPTOR)["items"]

_bytes_of = attrgetter("nbytes")

_WITHOUT_LEVELS = frozenset({FocalLoss, GIoULoss, CenternessLoss})
"""Losses that may have a usual layout. Not those derived from them, which may pack an item as they like."""


class LossBatch(NamedTuple):
    """A batch of evaluations, to go out in one message or, where that is too large, in several.

    Attributes:
        kind: Name of the loss in the contract's `oneof`.
        head: What each message has beside items.
        items: The items, each as a field.
        size: How long all of it is in one message.
        storage: Where its tensors lie, and those of its answer.
        read_usual: Reads its answer, if that is in its usual layout; None where there is no usual one.
    """

    kind: str
    head: bytes
    items: Sequence[Sequence[Piece]]
    size: int
    storage: Storage
    read_usual: Callable[[bytes], list[LossResult] | None] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """All of it in one message."""
        return [self.head, *chain.from_iterable(self.items)]

    @property
    def is_small(self) -> bool:
        """Whether any server reads it in one message."""
        return self.size <= SMALL_BYTES

    def calls(self, max_bytes: int | None) -> list[Call[list[LossResult]]]:
        """Returns the calls that evaluate it, in order.

        Args:
            max_bytes: What the server reads in one message; None for one call whatever its size.

        Raises:
            TooLargeError: One item alone is too large.
        """
        if max_bytes is None or self.size <= max_bytes:
            return [self._call(self.pieces, self.size, 0)]
        parts = [(first, [self.head, *chain.from_iterable(part)]) for first, part in self._parts(max_bytes)]
        return [self._call(request, size_of(request), first) for first, request in parts]

    def _call(self, request: Sequence[Piece], size: int, first_item: int) -> Call[list[LossResult]]:
        return Call(
            method="ComputeLoss",
            request=request,
            read=partial(read_loss_results, self.kind, self.storage, first_item),
            storage=self.storage,
            first_item=first_item,
            goes_in_chunks=size >= LEAST_BYTES,
            read_usual=self.read_usual,
        )

    def _parts(self, max_bytes: int) -> Iterator[tuple[int, list[Sequence[Piece]]]]:
        """Yields the items of requests of at most `max_bytes`, and where each begins."""
        room = max_bytes - len(self.head)
        part: list[Sequence[Piece]] = []
        used, first = 0, 0
        for index, item in enumerate(self.items):
            size = size_of(item)
            if size > room:
                raise too_large(f"items[{index}]", size, max_bytes)
            if part and used + size > room:
                yield first, part
                part, used, first = [], 0, index
            part.append(item)
            used += size
        yield first, part


class UsualCall(NamedTuple):
    """A call of one evaluation whose layout is known; see `CallLayout`.

    Attributes:
        call: All of it but its request, the same for all calls of this layout.
        request: What is sent.
    """

    call: Call[list[LossResult]]
    request: bytes


def usual_call(
    loss: LossConfig,
    items: Sequence[Sequence[Any]],
    options: EvaluationOptions,
    normalizers: Sequence[float | None] | None,
    *,
    shares_memory: bool,
) -> UsualCall | None:
    """Returns the call of a batch, as `loss_batch` takes it; None where its layout is not a usual one.

    Args:
        loss: Which loss.
        items: The arguments of each evaluation.
        options: What is asked of it.
        normalizers: A normalizer, or None, for each item.
        shares_memory: Whether tensors that are worth it lie in shared memory.
    """
    arrays = _usual_arrays(loss, items, normalizers)
    if arrays is None or not _are_plain(options):
        return None
    try:
        layout = _layout(loss, options, tuple([(array.dtype, array.shape) for array in arrays]))
    except TypeError:  # whatever is wrong with the options, it is for the general case to say
        return None
    if layout is None or (shares_memory and layout.largest_bytes >= SHARED_BYTES):
        return None
    return UsualCall(layout.call, layout.request(arrays))


def loss_batch(
    loss: LossConfig,
    items: Sequence[Sequence[Any]],
    options: EvaluationOptions,
    normalizers: Sequence[float | None] | None,
    storage: Storage,
) -> LossBatch:
    """Returns a batch of evaluations, each given by its arguments in order."""
    if options.wire_dtype is not None:
        storage.form = _narrow_form(loss, options)
    config = config_field(loss)
    if normalizers is not None and len(normalizers) != len(items):
        raise ValueError(f"normalizers has {len(normalizers)} entries, want {len(items)} as items")
    paths = [f"items[{index}].{loss.kind}" for index in range(len(items))]
    inputs = [loss.item(given, path, storage) for given, path in zip(items, paths, strict=True)]
    names = _wanted_names(loss, items, options.gradients, storage)
    gradient_dtype = _sent_gradient_dtype(options, storage)
    is_sparse = isinstance(loss, FCOSLoss) and bool(names)
    wanted = wanted_fields(names, gradient_dtype, options.component_gradients, options.strict, is_sparse)
    abouts = [
        _about(loss, path, names, gradient_dtype, normalizer, storage)
        for path, normalizer in zip(paths, normalizers or [None] * len(paths), strict=True)
    ]
    storage.wait_for_gpu()
    head = config + wanted
    fields = [message_field(_ITEM, [*pieces, about]) for pieces, about in zip(inputs, abouts, strict=True)]
    size = len(head) + sum(map(size_of, fields))
    is_single = type(loss) in _WITHOUT_LEVELS and len(items) == len(names) == 1
    read_usual = shared_answer(names[0], storage) if is_single else None
    return LossBatch(loss.kind, head, fields, size, storage, read_usual)


def _usual_arrays(
    loss: LossConfig, items: Sequence[Sequence[Any]], normalizers: Sequence[float | None] | None
) -> list[Array] | None:
    """Returns the arguments of a batch of one evaluation without levels; None of any other, or large ones."""
    if type(loss) not in _WITHOUT_LEVELS or len(items) != 1:
        return None
    if normalizers is not None and (len(normalizers) != 1 or normalizers[0] is not None):
        return None
    (arguments,) = items
    if not isinstance(arguments, tuple | list) or len(arguments) > len(loss.inputs):
        return None
    arrays = host_arrays(arguments)
    return None if arrays is None or sum(map(_bytes_of, arrays)) >= LARGE_BYTES else arrays


def _are_plain(options: EvaluationOptions) -> bool:
    """Whether a layout can be kept by options: they, and all that equal them, mean the same next time."""
    dtype = options.gradient_dtype
    return (
        options.wire_dtype is None
        and type(options.gradients) in {bool, str, tuple}
        and (dtype is None or isinstance(dtype, str | type | np.dtype))
        and type(options.component_gradients) is type(options.strict) is bool
    )


@lru_cache(maxsize=256)
def _layout(
    loss: LossConfig, options: EvaluationOptions, arrays: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]
) -> CallLayout | None:
    """Returns the usual layout of an evaluation of arrays of such types and shapes; None for no such."""
    names, dtype = gradient_names(loss, options.gradients), gradient_dtype_of(options.gradient_dtype)
    wanted = wanted_fields(names, dtype, options.component_gradients, options.strict, sparse_gradients=False)
    return layout_of_call(
        loss, config_field(loss) + wanted, names, dtype, [Layout(*array) for array in arrays]
    )


def _about(
    loss: LossConfig,
    path: str,
    names: tuple[str, ...],
    gradient_dtype: Any,
    normalizer: float | None,
    storage: Storage,
) -> bytes:
    """Returns what an item holds beside its inputs."""
    outputs: tuple[Output, ...] = ()
    if storage.has_pool:
        known = (name for name in names if name in loss.differentiable or isinstance(loss, CustomLoss))
        outputs = storage.outputs([(name, loss.input_path(path, name)) for name in known], gradient_dtype)
    about = b"" if normalizer is None else pb.LossItem(normalizer=normalizer).SerializeToString()
    return about + output_fields(outputs) if outputs else about


def loss_stream(
    loss: LossConfig,
    options: EvaluationOptions,
    normalizer: float | None,
    *,
    window: int,
    return_exceptions: bool,
) -> Stream[LossResult]:
    """Returns the stream of evaluations, each given by its arguments in order."""

    def make(arguments: Sequence[Any], storage: Storage) -> list[Piece]:
        usual = usual_call(loss, [arguments], options, [normalizer], shares_memory=storage.has_pool)
        if usual is None:
            return loss_batch(loss, [arguments], options, [normalizer], storage).pieces
        storage.form = usual.call.storage.form
        return [usual.request]

    def read(answer: Parcel[pb.ComputeLossResponse], storage: Storage) -> LossResult:
        (result,) = read_loss_results(loss.kind, storage, 0, answer)
        return result

    return Stream(
        method="ComputeLoss", make=make, read=read, window=window, return_exceptions=return_exceptions
    )


def _narrow_form(loss: LossConfig, options: EvaluationOptions) -> WireForm:
    dtype = wire_type(options.wire_dtype)
    if isinstance(loss, CustomLoss):
        message = "does not go with a custom loss, which does not say what of its inputs are predictions"
        raise refused_here(pb.ERROR_REASON_UNEXPECTED_FIELD, message, field="wire_dtype", value=dtype.name)
    if options.gradient_dtype is None:
        return WireForm(dtype)
    wanted = gradient_dtype_of(options.gradient_dtype)
    if wanted not in FLOAT_TYPES:
        name, reason = DTYPES[wanted].name, pb.ERROR_REASON_INVALID_OPTION
        raise refused_here(reason, f"is {name}, want a float type", field="gradient_dtype", value=name)
    return WireForm(dtype, DTYPES[wanted])


def _sent_gradient_dtype(options: EvaluationOptions, storage: Storage) -> Any:
    """Returns the `DataType` that gradients are asked for in; 0 for that of each input."""
    if storage.form.is_narrow:
        return tensor_pb2.DATA_TYPE_BFLOAT16  # those of a mean are below what float16 holds
    return gradient_dtype_of(options.gradient_dtype)


def _wanted_names(
    loss: LossConfig, items: Sequence[Sequence[Any]], gradients: Gradients, storage: Storage
) -> tuple[str, ...]:
    """Returns the inputs whose gradients are wanted; of a custom loss all floats of its first item."""
    if gradients is True and isinstance(loss, CustomLoss):
        path, names = f"items[0].{loss.kind}", items[0][0] if items else ()
        return tuple(sorted(name for name in names if storage.floats_at(loss.input_path(path, name))))
    return gradient_names(loss, gradients)
