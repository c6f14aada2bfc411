"""Where the arrays of a request come from, and the arrays: each is refused by the path of its field."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message

from lossd.tensors import TensorError, array_of, check_bools, layout
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Payloads
from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.shared_memory import AnyArray, Slices
from lossd_server.targets import GroundTruth


class Source(NamedTuple):
    """A tensor whose elements have not been looked at.

    Attributes:
        field: Where it stands, for errors.
        tensor: The tensor.
        name: The argument that it is, or part of.
        dtype: Its type.
        shape: Its shape.
        is_shared: Whether it lies in shared memory.
    """

    field: str
    tensor: tensor_pb2.Tensor
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_shared: bool


def source_of(field: str, tensor: tensor_pb2.Tensor, name: str = "") -> Source:
    """Returns the source of a tensor.

    Args:
        field: Where it stands, for errors.
        tensor: The tensor.
        name: The argument that it is, or part of.

    Raises:
        InvalidInputError: Its type or shape is none.
    """
    try:
        dtype, shape = layout(tensor)
    except TensorError as error:
        raise _refused(field, error) from error
    return Source(field, tensor, name, dtype, shape, tensor.HasField("shared"))


def sources_of_inputs(inputs: Message) -> dict[str, Any]:
    """Returns the sources of an inputs message by field name: one or None, or a list of what is repeated.

    Raises:
        InvalidInputError: The type or shape of a tensor is none, or a part of the ground truth is missing.
    """
    return {field.name: _sources_of_field(inputs, field.name) for field in inputs.DESCRIPTOR.fields}


def sources_of_ground_truth(field: str, objects: losses_pb2.GroundTruth) -> GroundTruth:
    """Returns the sources of the objects of one image.

    Raises:
        InvalidInputError: A part is missing, or its type or shape is none.
    """
    for name in ("boxes", "labels"):
        if not objects.HasField(name):
            raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field=f"{field}.{name}")
    return GroundTruth(
        boxes=source_of(f"{field}.boxes", objects.boxes),
        labels=source_of(f"{field}.labels", objects.labels),
        iscrowd=source_of(f"{field}.iscrowd", objects.iscrowd) if objects.HasField("iscrowd") else None,
    )


def _sources_of_field(inputs: Message, name: str) -> Any:
    value = getattr(inputs, name)
    if isinstance(value, tensor_pb2.Tensor):
        return source_of(name, value, name) if inputs.HasField(name) else None
    return [_source_of_entry(f"{name}[{index}]", entry, name) for index, entry in enumerate(value)]


def _source_of_entry(field: str, entry: Any, name: str) -> Any:
    if isinstance(entry, tensor_pb2.Tensor):
        return source_of(field, entry, name)
    return sources_of_ground_truth(field, entry)


class SourceReader:
    """Reads the arrays of one request.

    Args:
        payloads: What came beside the request's message.
        slices: The shared memory that it names.
        predictions: The arguments whose values cannot do harm: floats among them are read where they lie,
            also in shared memory. All else is checked, and so is a copy that the caller cannot change.
    """

    def __init__(self, payloads: Payloads, slices: Slices, predictions: Collection[str] = ()) -> None:
        self._payloads = payloads
        self._slices = slices
        self._predictions = predictions

    def arguments(self, sources: Any) -> Any:
        """Returns what was given with an array in place of every source: one, or lists and images of them.

        Raises:
            InvalidInputError: There is no such array.
        """
        if isinstance(sources, Source):
            return self._array(sources)
        if isinstance(sources, GroundTruth):
            return GroundTruth(*map(self.arguments, sources))
        if isinstance(sources, list):
            return [*map(self.arguments, sources)]
        return sources

    def _array(self, source: Source) -> AnyArray:
        try:
            if source.is_shared:
                return self._shared(source)
            return array_of(self._payloads.get(source.tensor.inline), source.dtype, source.shape)
        except TensorError as error:
            raise _refused(source.field, error) from error

    def _shared(self, source: Source) -> AnyArray:
        in_place = is_read_in_place(source, self._predictions)
        place, dtype, shape = source.tensor.shared, source.dtype, source.shape
        with errors_within(source.field):
            array = self._slices.read(place.region_id, place.offset, dtype, shape, in_place=in_place)
        if isinstance(array, np.ndarray):
            check_bools(array)
        return array


def is_read_in_place(source: Source, predictions: Collection[str]) -> bool:
    """Whether an array of shared memory is read where it lies: a prediction, whose values cannot do harm."""
    return source.name in predictions and source.dtype.name in checks.FLOATS


def _refused(field: str, error: TensorError) -> InvalidInputError:
    return InvalidInputError(Reason(error.reason), str(error), field=field, **error.values)
