"""The usual layout of the result of a small evaluation: so the server writes it, and so a client reads it.

Results of one form differ in the elements of their tensors, and in the few numbers behind them. To write or
read the rest field by field takes longer than a small evaluation does. It is a message as any other:
whoever does not know of layouts reads it, and what has another one is read by protobuf.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from lossd.tensors import Array, aligned
from lossd.v1 import loss_service_pb2 as pb
from lossd.varints import NoVarintError, read_varint
from lossd.wire import Buffer
from lossd.writing import (
    ALIGNMENT,
    elements_of,
    message_head,
    shared_tensor_field,
    tags_of,
    tensor_head,
)

_RESULTS = tags_of(pb.ComputeLossResponse.DESCRIPTOR)["results"]
_RESULT = tags_of(pb.LossResult.DESCRIPTOR)
_GRADIENT = tags_of(pb.Gradient.DESCRIPTOR)

_ABOUT_BYTES = 64
"""What a result has beside tensors, about."""


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


class ResultParts(NamedTuple):
    """The one result of an answer.

    Attributes:
        about: All of the result but its tensors.
        loss: The loss.
        gradient: The gradient, a view of the answer; None where none was sent.
        rest: What the answer has beside the result.
    """

    about: pb.LossResult
    loss: Array
    gradient: Array | None
    rest: pb.ComputeLossResponse


class ResultLayout(NamedTuple):
    """Where the tensors of a result lie: first in it, the gradient before the loss.

    Attributes:
        loss: The loss. Before it stands, where a gradient lies in shared memory, what says so.
        gradient: The gradient; None where none is sent. Elements of up to four bytes lie mostly where they
            can be used, in the first result of an answer.
    """

    loss: TensorLayout
    gradient: TensorLayout | None

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
        pieces = [self.loss.head, elements_of(loss), about]
        size = len(self.loss.head) + self.loss.size + len(about)
        if self.gradient is not None and gradient is not None:
            pieces = [self.gradient.head, elements_of(gradient), *pieces]
            size += len(self.gradient.head) + self.gradient.size
        return [message_head(_RESULTS, size), *pieces]

    def read(self, data: bytes) -> ResultParts | None:
        """Returns the one result of an answer; None where it has another layout, or is none."""
        try:
            size, start = read_varint(data, len(_RESULTS))
            gradient_at = loss_head_at = start
            if self.gradient is not None:
                gradient_at = start + len(self.gradient.head)
                loss_head_at = gradient_at + self.gradient.size
            loss_at = loss_head_at + len(self.loss.head)
            at, end = loss_at + self.loss.size, start + size
            if not (
                data.startswith(_RESULTS)
                and data[start - 1]  # else it is padded, and whether it may be is protobuf's to say
                and (self.gradient is None or data.startswith(self.gradient.head, start))
                and data.startswith(self.loss.head, loss_head_at)
                and at <= end <= len(data)
            ):
                return None
            about = pb.LossResult.FromString(data[at:end])
            rest = pb.ComputeLossResponse.FromString(data[end:])
        except (DecodeError, NoVarintError):
            return None
        if rest.results or about.gradients or about.HasField("loss") or about.HasField("kept_rows"):
            return None
        # The loss is a copy, which may outlive the answer.
        loss: Array = np.ndarray((), self.loss.dtype, data[loss_at:at])
        gradient = None
        if self.gradient is not None:
            gradient = aligned(np.ndarray(self.gradient.shape, self.gradient.dtype, data, gradient_at))
        return ResultParts(about, loss, gradient, rest)


@lru_cache(maxsize=1024)
def result_layout(
    loss: np.dtype[Any],
    name: str | None = None,
    dtype: np.dtype[Any] | None = None,
    shape: tuple[int, ...] = (),
) -> ResultLayout:
    """Returns the layout of a result.

    Args:
        loss: The type of its loss, which is one number.
        name: The input whose gradient it holds; None for none.
        dtype: The type of the gradient.
        shape: Its shape.
    """
    number = _number(loss)
    if name is None or dtype is None:
        return ResultLayout(number, None)
    size = math.prod(shape) * dtype.itemsize
    after = len(message_head(_RESULTS, size + _ABOUT_BYTES))
    head = _gradient_head(name, dtype, shape, 0)
    if padding := -(after + len(head)) % ALIGNMENT:
        head = _gradient_head(name, dtype, shape, padding)
    return ResultLayout(number, TensorLayout(head, size, dtype, shape))


@lru_cache(maxsize=1024)
def shared_result_layout(
    loss: np.dtype[Any],
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    region_id: bytes,
    offset: int,
) -> ResultLayout:
    """Returns the layout of a result whose gradient lies in shared memory: it says where.

    Args:
        loss: The type of its loss, which is one number.
        name: The input whose gradient it is.
        dtype: The type of the gradient.
        shape: Its shape.
        region_id: The region that it lies in.
        offset: Where it begins there, in bytes.
    """
    about = pb.Gradient(input=name).SerializeToString()
    tensor = shared_tensor_field(_GRADIENT["tensors"], dtype, shape, region_id, offset)
    head = message_head(_RESULT["gradients"], len(about) + len(tensor))
    return ResultLayout(_number(loss, before=head + about + tensor), None)


def _number(dtype: np.dtype[Any], before: bytes = b"") -> TensorLayout:
    return TensorLayout(before + tensor_head(_RESULT["loss"], dtype, ()), dtype.itemsize, dtype, ())


def _gradient_head(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], padding: int) -> bytes:
    """Returns what stands before the elements of a gradient, in so many bytes more than it needs."""
    tensor = tensor_head(_GRADIENT["tensors"], dtype, shape, padding)
    about = pb.Gradient(input=name).SerializeToString()
    size = math.prod(shape) * dtype.itemsize
    return message_head(_RESULT["gradients"], len(about) + len(tensor) + size) + about + tensor
