"""Where the tensors of a call lie: in memory that the server shares, or in the messages."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import grpc
import ml_dtypes
import numpy as np

from lossd.gpu_memory import GpuArray
from lossd.tensors import DTYPES, data_type_of, layout, unpack
from lossd.v1 import tensor_pb2
from lossd.wire import Payloads
from lossd.writing import Piece, shared_tensor_field, tensor_field
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


Place = tuple[bytes, int]
"""Where an array lies in shared memory: the region, and the offset in bytes."""


class Output(NamedTuple):
    """Where the gradient of an input is written, one place or one a level."""

    name: str
    places: tuple[Place, ...]


class MemoryInUseError(Exception):
    """A call that nobody said is over, and that is to be made again with other memory for its answer."""


class Storage:
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
        self._pool = pool
        self._tries = tries
        self._room = 0 if pool is None else pool.max_bytes
        self._regions: set[bytes] = set()
        # As they are sent, by path. The pool uses shared memory again when nothing refers to its array.
        self._inputs: dict[str, AnyArray] = {}
        self._written: dict[Place, AnyArray] = {}
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
    def has_pool(self) -> bool:
        """Whether there is shared memory."""
        return self._pool is not None

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

    def pack(
        self,
        path: str,
        tag: bytes,
        array: AnyArray,
        form: Callable[[Array], Array] = lambda array: array,
    ) -> list[Piece]:
        """Returns the tensor of an array as a field; the array is left as it is until the call has ended.

        Args:
            path: Where it stands in the request.
            tag: The tag of the field.
            array: The array.
            form: Returns what goes in place of an array that does not lie in shared memory already.

        Raises:
            TensorError: The contract has no such type, or the array too many dimensions.
        """
        place = self._found(array)
        if place is None:
            sent = form(array.numpy() if isinstance(array, GpuArray) else array)
            place = self._copied(sent)
            if place is None:
                self._inputs[path] = sent
                return tensor_field(tag, sent)
        self._inputs[path] = place.array
        self._note(place)
        array = place.array
        return [shared_tensor_field(tag, array.dtype, tuple(array.shape), place.region_id, place.offset)]

    def floats_at(self, path: str) -> list[AnyArray]:
        """Returns an input as it is sent, one array or one a level; none where it is no input of floats."""
        levels = takewhile(self._inputs.__contains__, (f"{path}[{level}]" for level in count()))
        paths = [path] if path in self._inputs else levels
        arrays = [self._inputs[each] for each in paths]
        return arrays if all(data_type_of(array.dtype) in FLOAT_TYPES for array in arrays) else []

    def outputs(self, wanted: Iterable[tuple[str, str]], gradient_dtype: Any) -> tuple[Output, ...]:
        """Gives the gradients of an item that are worth it a place in shared memory.

        Args:
            wanted: The inputs whose gradients are wanted: the name of each, and where it stands.
            gradient_dtype: A `DataType`, or 0 for that of each input.
        """
        paths = dict(wanted)
        found = [self._output(name, self.floats_at(path), gradient_dtype) for name, path in paths.items()]
        return tuple([output for output in found if output.places])

    def written(self) -> Mapping[Place, AnyArray]:
        """Returns the arrays that the server writes to, by where they lie."""
        return self._written

    def wait_for_gpu(self) -> None:
        """Waits until memory of the GPU that the request names may be read, and is read by nobody else."""
        if self._pool is not None and any(isinstance(array, GpuArray) for array in self._inputs.values()):
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
        return read_only(array)

    def _found(self, array: AnyArray) -> "Slice | None":
        """Returns where an array lies in shared memory, if it does."""
        if self._pool is None or array.nbytes > self._room:
            return None
        if not isinstance(array, GpuArray) and not (self._is_worth_it(array) and _is_as_sent(array)):
            return None
        return self._pool.find(array)

    def _copied(self, array: Array) -> "Slice | None":
        """Returns where a copy of an array lies in shared memory; None where it is not worth it."""
        if self._pool is None or not self._is_worth_it(array):
            return None
        place = self._pool.allocate(array.shape, DTYPES[data_type_of(array.dtype)])
        if place is not None:
            np.copyto(place.array, array)  # type: ignore[arg-type]  # an array of the host's
        return place

    def _is_worth_it(self, array: Array) -> bool:
        return LEAST_BYTES <= array.nbytes <= self._room

    def _output(self, name: str, inputs: Sequence[AnyArray], gradient_dtype: Any) -> Output:
        layouts = [(DTYPES[gradient_dtype or data_type_of(array.dtype)], array.shape) for array in inputs]
        length = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layouts)
        on_gpu = any(isinstance(array, GpuArray) for array in inputs)
        if not (on_gpu or length >= LEAST_BYTES) or length > self._room:
            return Output(name, ())
        slices = self._allocate(layouts, on_gpu=on_gpu)
        for place in slices:
            self._written[place.region_id, place.offset] = place.array
            self._note(place)
        return Output(name, tuple([(place.region_id, place.offset) for place in slices]))

    def _note(self, place: "Slice") -> None:
        self._regions.add(place.region_id)
        # The server bounds what the slices of a request come to, also where one is named twice.
        self._room -= place.array.nbytes

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


def read_only(array: AnyArray) -> AnyArray:
    """Returns an array of shared memory as it is handed out: nobody writes to it, but on a GPU."""
    if isinstance(array, GpuArray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _is_as_sent(array: Array) -> bool:
    """Whether an array has a type of the contract, in the byte order of the wire."""
    return array.dtype == DTYPES[data_type_of(array.dtype)]
