"""Where the tensors of a call lie: in memory that the server shares, or in the messages."""

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import ml_dtypes
import numpy as np

from lossd.gpu_memory import GpuArray
from lossd.tensors import DTYPES, data_type_of, layout, put, put_shared, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Payloads
from lossd_client._arrays import AnyArray, Array
from lossd_client._errors import LossdError, ServerError
from lossd_client._wire_form import WireForm

if TYPE_CHECKING:
    from lossd_client._maps import DenseForm
    from lossd_client._shared_memory.pool import Pool, Slice

LEAST_BYTES = 64 << 10
"""Smaller tensors are sent sooner than they are placed.

A call with gradient took 1.15 ms sent and 1.21 placed at 16 kB, 1.45 and 1.41 at 64, 2.3 and 1.5 at 256.
"""

FLOAT_TYPES = frozenset(data_type_of(np.dtype(name)) for name in ("f2", "f4", "f8", ml_dtypes.bfloat16))
"""The types that an input with a gradient may have."""

_UNKNOWN_REGION = "UNKNOWN_REGION"


class MemoryInUseError(Exception):
    """A call that nobody said is over, and that is to be made again with other memory for its answer."""


class Storage(Payloads):
    """What a request is packed into, and its answer read from.

    A context manager around one try at a call. Where the memory is of no more use, because the server
    does not know it or somebody may still write to it, the block ends without an error, and the call is
    to be tried with `again`.

    Attributes:
        form: In what form predictions travel.
        dense_form: Of the targets to be made of sparse ones; None where sparse ones are wanted.

    Args:
        pool: Shared memory, if there is any.
        tries: How often memory is shared, and then not known, before all goes into messages.
    """

    def __init__(self, pool: "Pool | None", tries: int = 2) -> None:
        super().__init__()
        self._pool = pool
        self._tries = tries
        self._room = 0 if pool is None else pool.max_bytes
        self._regions: set[bytes] = set()
        self._read: list[AnyArray] = []
        self._written: dict[tuple[bytes, int], AnyArray] = {}
        self._gpu_regions: set[bytes] = set()
        self._is_known = True
        self.form = WireForm()
        self.dense_form: DenseForm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, LossdError) and error.reason:
            return self.has_lost(error)
        if error is not None:
            self.abandon()
        return isinstance(error, MemoryInUseError)

    @property
    def shares_memory(self) -> bool:
        """Whether a tensor of the request or its answer lies in shared memory."""
        return bool(self._regions)

    @property
    def is_written_to(self) -> bool:
        """Whether the server writes to the memory of this call."""
        return bool(self._written)

    def has_lost(self, error: LossdError) -> bool:
        """Returns whether a call failed since the server does not know its memory."""
        self._is_known = error.reason != _UNKNOWN_REGION or self._pool is None
        return not self._is_known

    def abandon(self) -> None:
        """Gives up a call that nobody said is over: its gradients may be written at any time."""
        if self._pool is not None:
            self._pool.retire(self._written.values())

    def again(self) -> "Storage":
        """Returns where to try again: the memory, passed anew if need be, or at last the messages alone."""
        if self._is_known:
            return Storage(self._pool, self._tries)
        pool, tries = self._pool, self._tries - 1
        if pool is None or not tries or not pool.renew(self._regions):
            return Storage(None)
        return Storage(pool, tries)

    def put(
        self,
        array: AnyArray,
        tensor: tensor_pb2.Tensor,
        form: Callable[[Array], Array] = lambda array: array,
    ) -> None:
        """Makes an empty message that of an array, which is left as it is until the call has ended.

        Args:
            array: The array.
            tensor: The message.
            form: Returns what goes in place of an array that does not lie in shared memory already.

        Raises:
            TensorError: The contract has no such type, or the array too many dimensions.
        """
        if isinstance(array, GpuArray):
            if self._put_on_gpu(array, tensor):
                return
            array = array.numpy()
        place = self._found(array)
        if place is None:
            array = form(array)
            place = self._copied(array)
        if place is None:
            put(array, tensor, self)
        else:
            put_shared(place.array, tensor, _message(place))

    def add_outputs(self, request: pb.ComputeLossRequest, kind: str, differentiable: Sequence[str]) -> None:
        """Gives every gradient that is worth it a place in shared memory; the request may go then.

        Args:
            request: The request, whole but for that.
            kind: Name of its loss.
            differentiable: Names of the inputs that have gradients; empty for a custom loss.
        """
        if self._pool is None:
            return
        for item in request.items:
            inputs = getattr(item, kind)
            for name in dict.fromkeys(request.gradients):
                if tensors := _float_tensors(inputs, name, differentiable):
                    self._add_output(item, name, tensors, request.gradient_dtype)
        if self._gpu_regions:
            # What is read has to be there, and what is written to has to be read by nobody any more.
            self._pool.wait_for_gpu()

    def read(self, tensor: tensor_pb2.Tensor, payloads: Payloads) -> AnyArray:
        """Returns the array of a tensor in an answer, read-only where it is the host's.

        Args:
            tensor: The tensor.
            payloads: Those of the answer.

        Raises:
            ServerError: It lies where this call has no memory.
        """
        if not tensor.HasField("shared"):
            return unpack(tensor, payloads)
        array = self._written.get((tensor.shared.region_id, tensor.shared.offset))
        if array is None or layout(tensor) != (array.dtype, array.shape):
            raise ServerError(grpc.StatusCode.INTERNAL, "the answer lies in memory that it was not given")
        if isinstance(array, GpuArray):
            return array
        view = array.view()
        view.flags.writeable = False
        return view

    def _found(self, array: Array) -> "Slice | None":
        """Returns where an array lies in shared memory, if it does."""
        if self._pool is None or not self._is_worth_it(array):
            return None
        if array.dtype != DTYPES[data_type_of(array.dtype)]:
            return None
        return self._read_at(self._pool.find(array))

    def _copied(self, array: Array) -> "Slice | None":
        """Returns where a copy of an array lies in shared memory; None where it is not worth it."""
        if self._pool is None or not self._is_worth_it(array):
            return None
        place = self._pool.allocate(array.shape, DTYPES[data_type_of(array.dtype)])
        if place is not None:
            np.copyto(place.array, array)  # type: ignore[arg-type]  # an array of the host's
        return self._read_at(place)

    def _is_worth_it(self, array: Array) -> bool:
        return LEAST_BYTES <= array.nbytes <= self._room

    def _read_at(self, place: "Slice | None") -> "Slice | None":
        """Takes in where the server reads an array, if anywhere."""
        if place is not None:
            self._read.append(place.array)
            self._note(place)
        return place

    def _add_output(
        self, item: pb.LossItem, name: str, tensors: Sequence[tensor_pb2.Tensor], gradient_dtype: Any
    ) -> None:
        layouts = [(DTYPES[gradient_dtype or tensor.dtype], tuple(tensor.shape)) for tensor in tensors]
        length = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layouts)
        on_gpu = any(tensor.shared.region_id in self._gpu_regions for tensor in tensors)
        if not (on_gpu or length >= LEAST_BYTES) or length > self._room:
            return
        places = self._allocate(layouts, on_gpu=on_gpu)
        if places:
            item.outputs.add(input=name, slices=map(_message, places))
            for place in places:
                self._written[place.region_id, place.offset] = place.array
                self._note(place)

    def _note(self, place: "Slice") -> None:
        self._regions.add(place.region_id)
        # The server bounds what the slices of a request come to, also where one is named twice.
        self._room -= place.array.nbytes

    def _put_on_gpu(self, array: GpuArray, tensor: tensor_pb2.Tensor) -> bool:
        """Makes a message that of an array on a GPU; returns whether the server has its memory."""
        place = None if self._pool is None else self._pool.find(array)
        if place is None or array.nbytes > self._room:
            return False
        put_shared(array, tensor, _message(place))
        self._gpu_regions.add(place.region_id)
        self._read.append(array)
        self._note(place)
        return True

    def _allocate(
        self, layouts: Sequence[tuple[np.dtype[Any], tuple[int, ...]]], *, on_gpu: bool
    ) -> "list[Slice]":
        """Returns places for arrays: for all of them, or none."""
        places: list[Slice] = []
        for dtype, shape in layouts:
            place = None if self._pool is None else self._pool.allocate(shape, dtype, on_gpu=on_gpu)
            if place is None:
                return []
            places.append(place)
        return places


def _message(place: "Slice") -> tensor_pb2.SharedSlice:
    return tensor_pb2.SharedSlice(region_id=place.region_id, offset=place.offset)


def _float_tensors(inputs: Any, name: str, differentiable: Sequence[str]) -> list[tensor_pb2.Tensor]:
    """Returns the tensors of a differentiable input, one or one a level; none where there is no such."""
    if isinstance(inputs, losses_pb2.CustomInputs):
        tensors = [inputs.tensors[name]] if name in inputs.tensors else []
    elif name in differentiable:
        value = getattr(inputs, name)
        tensors = [value] if isinstance(value, tensor_pb2.Tensor) else list(value)
    else:
        tensors = []
    return tensors if all(tensor.dtype in FLOAT_TYPES for tensor in tensors) else []
