"""What small calls have in common that evaluate one loss on arrays of the same types and shapes.

Of such requests all but the elements of the arrays is the same, and so is where the tensors of an answer
lie, as lossd writes it. To make the one and read the other field by field takes a small call longer than its
evaluation, and most of that is code that has left the processor's caches since the last call.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from lossd.narrow import type_depends_on_values
from lossd.tensors import DTYPES, MAX_DIMENSIONS, TensorError, array_of, data_type_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import NoVarintError, read_varint
from lossd.wire import Buffer
from lossd.writing import elements_of, message_head, tags_of, tensor_head
from lossd_client._arrays import Array
from lossd_client._configs import LossConfig, tags_of_inputs
from lossd_client._gradients import GradientArrays
from lossd_client._results import LossResult
from lossd_client._wire_form import Layout, WireForm

_RESULTS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"]
_RESULT = tags_of(pb.LossResult.DESCRIPTOR)
_GRADIENT = tags_of(pb.Gradient.DESCRIPTOR)
_REQUEST = tags_of(pb.ComputeLossRequest.DESCRIPTOR)
_ITEM = tags_of(pb.LossItem.DESCRIPTOR)

_TYPES = frozenset(DTYPES.values())
_FLOAT32, _FLOAT64 = np.dtype("<f4"), np.dtype("<f8")


class _Tensor(NamedTuple):
    """A tensor in a message.

    Attributes:
        head: What stands before its elements.
        size: How many bytes these are.
        dtype: Their type.
        shape: Its shape.
    """

    head: bytes
    size: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def head_before(self, end: int, data: bytes) -> int:
        """Returns where the head begins, if the tensor ends at some place in an answer; else -1.

        No tensor ends at -1.
        """
        start = end - self.size - len(self.head)
        return start if start >= 0 and data.startswith(self.head, start) else -1

    def read_before(self, end: int, data: Buffer) -> Array:
        """Returns the array of the tensor that ends at some place."""
        return array_of(data[end - self.size : end], self.dtype, self.shape)


class AnswerLayout(NamedTuple):
    """Where the tensors of an answer lie: last in its one result, the gradient after the loss.

    Attributes:
        name: The input whose gradient was asked for.
        loss: The loss.
        gradient: The gradient; None where none was asked for.
    """

    name: str
    loss: _Tensor
    gradient: _Tensor | None

    @property
    def gradient_size(self) -> int:
        """How many bytes the elements of the gradient take."""
        return 0 if self.gradient is None else self.gradient.size

    def read(self, data: bytes) -> list[LossResult] | None:
        """Returns the one result of an answer; None where it has another layout, or is none."""
        try:
            size, start = read_varint(data, len(_RESULTS))
            end = start + size
            loss_end = end if self.gradient is None else self.gradient.head_before(end, data)
            at = self.loss.head_before(loss_end, data)
            # Whether a length may be padded is protobuf's to say.
            if not (data.startswith(message_head(_RESULTS, size)) and start <= at and end <= len(data)):
                return None
            # What is before the tensors is whole fields, and so a field begins where the first of them does.
            about = pb.LossResult.FromString(data[start:at])
            rest = pb.ComputeLossResponse.FromString(data[end:])
            if rest.results or about.gradients or about.HasField("loss") or about.HasField("kept_rows"):
                return None
            loss, gradients = self.loss.read_before(loss_end, data), {}
            if self.gradient is not None:  # a view; the loss is a copy, and outlives it
                gradients[self.name] = self.gradient.read_before(end, memoryview(data))
        except (DecodeError, NoVarintError, TensorError):
            return None
        return [LossResult(loss, GradientArrays(gradients), None, about, rest)]


class CallLayout(NamedTuple):
    """A call.

    Attributes:
        heads: What stands before the elements of each array in the request.
        form: In what form its prediction travels. All such calls share it, and nobody changes it.
        answer: The layout of its answer.
    """

    heads: tuple[bytes, ...]
    form: WireForm
    answer: AnswerLayout

    def request(self, arrays: Sequence[Array]) -> bytes:
        """Returns the request with arrays of these types and shapes, in order."""
        return b"".join(chain.from_iterable(zip(self.heads, map(elements_of, arrays), strict=True)))


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
    form = WireForm()
    form.note(f"items[0].{loss.kind}.{name}", prediction)
    wanted = prediction._replace(dtype=DTYPES.get(gradient_dtype, prediction.dtype))
    return CallLayout(
        heads=tuple(heads),
        form=form,
        answer=AnswerLayout(
            name, _loss_tensor(prediction.dtype), _gradient_tensor(name, wanted) if gradients else None
        ),
    )


def _is_sent_as_it_is(array: Layout, size: int) -> bool:
    dtype, shape = array
    return dtype in _TYPES and len(shape) <= MAX_DIMENSIONS and not type_depends_on_values(dtype, size)


def _loss_tensor(prediction: np.dtype[Any]) -> _Tensor:
    dtype = _FLOAT64 if prediction == _FLOAT64 else _FLOAT32
    return _Tensor(tensor_head(_RESULT["loss"], dtype, ()), dtype.itemsize, dtype, ())


def _gradient_tensor(name: str, layout: Layout) -> _Tensor:
    dtype, shape = layout
    size = math.prod(shape) * dtype.itemsize
    tensor = tensor_head(_GRADIENT["tensors"], dtype, shape)
    about = pb.Gradient(input=name).SerializeToString()
    head = message_head(_RESULT["gradients"], len(about) + len(tensor) + size) + about + tensor
    return _Tensor(head, size, dtype, shape)
