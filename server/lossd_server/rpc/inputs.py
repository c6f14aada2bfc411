"""From the tensors of a request to arrays, each refused by the path of its field."""

from typing import Any

from google.protobuf.message import Message

from lossd.tensors import Array, TensorError, unpack
from lossd.v1 import losses_pb2, tensor_pb2
from lossd.wire import Payloads
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.targets import GroundTruth


class InputReader:
    """Reads the tensors of one request.

    Args:
        payloads: What came beside the request's message.
    """

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads

    def tensor(self, field: str, tensor: tensor_pb2.Tensor) -> Array:
        """Returns the array of a tensor.

        Raises:
            InvalidInputError: It means none.
        """
        try:
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
            return self.tensor(name, value) if inputs.HasField(name) else None
        return [self._entry(f"{name}[{index}]", entry) for index, entry in enumerate(value)]

    def _entry(self, field: str, entry: Any) -> Any:
        read = self.tensor if isinstance(entry, tensor_pb2.Tensor) else self.ground_truth
        return read(field, entry)
