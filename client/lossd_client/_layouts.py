"""What small calls have in common that evaluate one loss on arrays of the same types and shapes.

Of such requests all but the elements of the arrays is the same, and so is where the tensors of an answer
lie, as lossd writes it. To make the one and read the other field by field takes a small call longer than its
evaluation, and most of that is code that has left the processor's caches since the last call.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from lossd.answers import ResultLayout, result_layout, shared_result_layout
from lossd.narrow import type_depends_on_values
from lossd.tensors import DTYPES, MAX_DIMENSIONS, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.writing import elements_of, message_head, tags_of, tensor_head
from lossd_client._arrays import AnyArray, Array
from lossd_client._calls import Call
from lossd_client._config import LossConfig, tags_of_inputs
from lossd_client._gradients import GradientArrays
from lossd_client._results import LossResult, read_loss_results
from lossd_client._storage import Storage, read_only
from lossd_client._wire_form import Layout

_REQUEST = tags_of(pb.ComputeLossRequest.DESCRIPTOR)
_ITEM = tags_of(pb.LossItem.DESCRIPTOR)

_TYPES = frozenset(DTYPES.values())
_FLOAT32, _FLOAT64 = np.dtype("<f4"), np.dtype("<f8")


class AnswerLayout(NamedTuple):
    """What the answer to a call of one evaluation looks like.

    Attributes:
        name: The input whose gradient was asked for, where one was.
        result: The layout of its result.
        written: The gradient, where the server writes it to shared memory.
    """

    name: str
    result: ResultLayout
    written: AnyArray | None = None

    def read(self, data: bytes) -> list[LossResult] | None:
        """Returns the one result of an answer; None where it has another layout, or is none."""
        found = self.result.read(data)
        if found is None:
            return None
        about, loss, sent, rest = found
        gradient = sent if self.written is None else read_only(self.written)
        gradients = {} if gradient is None else {self.name: gradient}
        return [LossResult(loss, GradientArrays(gradients), None, about, rest)]


class CallLayout(NamedTuple):
    """A call.

    Attributes:
        heads: What stands before the elements of each array in the request.
        call: All of it but its request. All such calls share it, and nobody changes it.
        largest_bytes: What the largest tensor of the request or its answer comes to.
    """

    heads: tuple[bytes, ...]
    call: Call[list[LossResult]]
    largest_bytes: int

    def request(self, arrays: Sequence[Array]) -> bytes:
        """Returns the request with arrays of these types and shapes, in order."""
        return b"".join(chain.from_iterable(zip(self.heads, map(elements_of, arrays), strict=True)))


def shared_answer(name: str, storage: Storage) -> Callable[[bytes], list[LossResult] | None] | None:
    """Returns what reads the usual answer to a call of one evaluation whose gradient is in shared memory.

    None where it is not, or is not handed out as it lies there.

    Args:
        name: The input whose gradient was asked for.
        storage: What the request was packed into.
    """
    written = storage.written()
    if len(written) != 1 or storage.form.is_narrow:
        return None
    ((place, array),) = written.items()
    loss = _FLOAT64 if array.dtype == _FLOAT64 else _FLOAT32
    layout = shared_result_layout(loss, name, array.dtype, tuple(array.shape), *place)
    return AnswerLayout(name, layout, array).read


def layout_of_call(
    loss: LossConfig, head: bytes, gradients: Sequence[str], gradient_dtype: Any, arrays: Sequence[Layout]
) -> CallLayout | None:
    """Returns the layout of a small call; None where it is not of the usual kind.

    Args:
        loss: A loss whose arguments are arrays, and have no levels.
        head: What the request has beside its item.
        gradients: Names of the inputs whose gradients are wanted.
        gradient_dtype: A `DataType`, or 0 for that of the input.
        arrays: Of what types and shapes the arguments are. Where there is nothing in one, that is unusual.
    """
    sizes = [math.prod(array.shape) * array.dtype.itemsize for array in arrays]
    name = loss.inputs[0]
    if not (arrays and all(sizes) and all(map(_is_sent_as_it_is, arrays, sizes))):
        return None
    if [*gradients] not in ([], [name]):
        return None
    prediction = Layout(DTYPES[data_type_of(arrays[0].dtype)], arrays[0].shape)
    tags = tags_of_inputs(loss.kind)
    heads = [tensor_head(tags[each], *array) for each, array in zip(loss.inputs, arrays, strict=False)]
    inputs = sum(map(len, heads)) + sum(sizes)
    item = message_head(_ITEM[loss.kind], inputs)
    heads[0] = head + message_head(_REQUEST["items"], len(item) + inputs) + item + heads[0]
    storage = Storage(None)
    storage.form.note(f"items[0].{loss.kind}.{name}", prediction)
    loss_dtype = _FLOAT64 if prediction.dtype == _FLOAT64 else _FLOAT32
    result = result_layout(loss_dtype)
    if gradients:
        dtype = DTYPES.get(gradient_dtype, prediction.dtype)
        result = result_layout(loss_dtype, name, dtype, prediction.shape)
    call = Call(
        method="ComputeLoss",
        request=(),
        read=partial(read_loss_results, loss.kind, storage, 0),
        storage=storage,
        read_usual=AnswerLayout(name, result).read,
    )
    return CallLayout(tuple(heads), call, max(*sizes, result.gradient_size))


def _is_sent_as_it_is(array: Layout, size: int) -> bool:
    dtype, shape = array
    return dtype in _TYPES and len(shape) <= MAX_DIMENSIONS and not type_depends_on_values(dtype, size)
