"""The usual layout of the result of a small evaluation: so the server writes it, and so a client reads it.

Results of one form differ in the elements of their tensors, and in the few numbers before them. To write or
read the rest field by field takes longer than a small evaluation does. It is a message as any other:
whoever does not know of layouts reads it, and what has another one is read by protobuf.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from lossd.tensors import Array, TensorError, array_of
from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import NoVarintError, read_varint
from lossd.wire import Buffer
from lossd.writing import elements_of, message_head, tags_of, tensor_head

_RESULTS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"]
_RESULT = tags_of(pb.LossResult.DESCRIPTOR)
_GRADIENT = tags_of(pb.Gradient.DESCRIPTOR)

_FLOAT32, _FLOAT64 = np.dtype("<f4"), np.dtype("<f8")


class TensorLayout(NamedTuple):
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


class ResultParts(NamedTuple):
    """The one result of an answer.

    Attributes:
        about: All of the result but its tensors.
        loss: The loss.
        gradient: The gradient, a view of the answer; None where none was asked for.
        rest: What the answer has beside the result.
    """

    about: pb.LossResult
    loss: Array
    gradient: Array | None
    rest: pb.ComputeLossResponse


class ResultLayout(NamedTuple):
    """Where the tensors of a result lie: last in it, the gradient after the loss.

    Attributes:
        loss: The loss.
        gradient: The gradient; None where none was asked for.
    """

    loss: TensorLayout
    gradient: TensorLayout | None

    @classmethod
    def of(cls, prediction: np.dtype[Any]) -> "ResultLayout":
        """Returns the layout of a result without a gradient, given the type of the predictions."""
        dtype = _FLOAT64 if prediction == _FLOAT64 else _FLOAT32
        return cls(TensorLayout(tensor_head(_RESULT["loss"], dtype, ()), dtype.itemsize, dtype, ()), None)

    def with_gradient(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> "ResultLayout":
        """Returns the layout with the gradient of an input, which is of this type and shape."""
        size = math.prod(shape) * dtype.itemsize
        tensor = tensor_head(_GRADIENT["tensors"], dtype, shape)
        about = pb.Gradient(input=name).SerializeToString()
        head = message_head(_RESULT["gradients"], len(about) + len(tensor) + size) + about + tensor
        return self._replace(gradient=TensorLayout(head, size, dtype, shape))

    @property
    def gradient_size(self) -> int:
        """How many bytes the elements of the gradient take."""
        return 0 if self.gradient is None else self.gradient.size

    def pieces(self, about: bytes, loss: Array, gradient: Array | None = None) -> list[Buffer]:
        """Returns a result, as a field of an answer.

        Args:
            about: All of it but its tensors.
            loss: The loss.
            gradient: The gradient, where there is one in this layout.
        """
        size = len(about) + len(self.loss.head) + self.loss.size
        pieces = [about, self.loss.head, elements_of(loss)]
        if self.gradient is not None and gradient is not None:
            size += len(self.gradient.head) + self.gradient.size
            pieces += self.gradient.head, elements_of(gradient)
        return [message_head(_RESULTS, size), *pieces]

    def read(self, data: bytes) -> ResultParts | None:
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
            loss, gradient = self.loss.read_before(loss_end, data), None
            if self.gradient is not None:  # a view; the loss is a copy, and outlives it
                gradient = self.gradient.read_before(end, memoryview(data))
        except (DecodeError, NoVarintError, TensorError):
            return None
        return ResultParts(about, loss, gradient, rest)
