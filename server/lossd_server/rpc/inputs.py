"""From the tensors of a request to arrays, each refused by the path of its field."""

from collections.abc import Collection
from typing import Any

import numpy as np
from google.protobuf.message import Message

from lossd.tensors import TensorError, check_bools, layout, unpack
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Payloads
from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason, errors_within
from lossd_server.shared_memory import AnyArray, Slices
from lossd_server.targets import GroundTruth


class InputReader:
    """Reads the tensors of one request.

    Args:
        payloads: What came beside the request's message.
        slices: The shared memory that it names.
        predictions: The fields whose values cannot do harm: floats among them are read where they lie,
            also in shared memory. All else is checked, and so is a copy that the caller cannot change.
    """

    def __init__(self, payloads: Payloads, slices: Slices, predictions: Collection[str] = ()) -> None:
        self._payloads = payloads
        self._slices = slices
        self._predictions = predictions

    def tensor(self, field: str, tensor: tensor_pb2.Tensor, name: str = "") -> AnyArray:
        """Returns the array of a tensor.

        Args:
            field: Where it stands, for errors.
            tensor: The tensor.
            name: The argument that it is, or part of.

        Raises:
            InvalidInputError: It means none.
        """
        try:
            if tensor.HasField("shared"):
                return self._shared(field, tensor, name)
            return unpack(tensor, self._payloads)
        except TensorError as error:
            raise InvalidInputError(Reason(error.reason), str(error), field=field, **error.values) from error

    def ground_truth(self, field: str, objects: losses_pb2.GroundTruth) -> GroundTruth:
        """Returns the objects of one image.

        Raises:
            InvalidInputError: A part is missing, or no array.
        """
        for name in ("boxes", "labels"):
            if not objects.HasField(name):
                raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field=f"{field}.{name}")
        return GroundTruth(
            boxes=self.tensor(f"{field}.boxes", objects.boxes),
            labels=self.tensor(f"{field}.labels", objects.labels),
            iscrowd=self.tensor(f"{field}.iscrowd", objects.iscrowd) if objects.HasField("iscrowd") else None,
        )

    def field(self, inputs: Message, name: str) -> Any:
        """Returns a field of an inputs message: an array or None, or a list of what it repeats.

        Raises:
            InvalidInputError: A tensor means no array, or a part of the ground truth is missing.
        """
        value = getattr(inputs, name)
        if isinstance(value, tensor_pb2.Tensor):
            return self.tensor(name, value, name) if inputs.HasField(name) else None
        return [self._entry(f"{name}[{index}]", entry, name) for index, entry in enumerate(value)]

    def _entry(self, field: str, entry: Any, name: str) -> Any:
        if isinstance(entry, tensor_pb2.Tensor):
            return self.tensor(field, entry, name)
        return self.ground_truth(field, entry)

    def _shared(self, field: str, tensor: tensor_pb2.Tensor, name: str) -> AnyArray:
        dtype, shape = layout(tensor)
        in_place = name in self._predictions and dtype.name in checks.FLOATS
        place = tensor.shared
        with errors_within(field):
            array = self._slices.read(place.region_id, place.offset, dtype, shape, in_place=in_place)
        if isinstance(array, np.ndarray):
            check_bools(array)
        return array
