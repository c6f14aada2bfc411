"""Whatever a caller holds, as messages of the contract: each is written in its place, and so not copied."""

from collections.abc import Mapping, Sequence
from typing import Any

from lossd.gpu_memory import GpuArray
from lossd.narrow import narrowed_integers
from lossd.tensors import TensorError
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2, tensor_pb2
from lossd_client._arrays import as_array
from lossd_client._errors import refused_here
from lossd_client._storage import Storage


def put_tensor(
    field: str, value: Any, tensor: tensor_pb2.Tensor, storage: Storage, *, on_gpu: bool = False
) -> None:
    """Makes an empty message that of a value; raises `InvalidInputError` by field.

    Args:
        field: Where it stands in the request.
        value: The value.
        tensor: The message.
        storage: Where it is to lie.
        on_gpu: Whether a shared array of a GPU is taken where it lies; if not, a copy is sent.
    """
    is_there = on_gpu and isinstance(value, GpuArray)
    try:
        storage.put(value if is_there else as_array(value), tensor)
    except TensorError as error:
        raise _refused(field, error) from error


def put_prediction(
    field: str, value: Any, tensor: tensor_pb2.Tensor, storage: Storage, *, keep: bool = False
) -> None:
    """Does the same for a prediction, in the form in which predictions travel.

    Args:
        field: As above, like the next three.
        value: The prediction.
        tensor: The message.
        storage: Where it is to lie.
        keep: Whether it is sent in its own type whatever the form.
    """
    try:
        is_there = isinstance(value, GpuArray) and not storage.form.is_narrow
        array = value if is_there else as_array(value)
        storage.put(storage.form.prediction(field, array, keep=keep), tensor)
    except TensorError as error:
        raise _refused(field, error) from error


def put_labels(field: str, value: Any, tensor: tensor_pb2.Tensor, storage: Storage) -> None:
    """Does the same for labels: in the smallest type that holds them, unless they lie in shared memory."""
    try:
        storage.put(as_array(value), tensor, narrowed_integers)
    except TensorError as error:
        raise _refused(field, error) from error


def put_ground_truth(images: Sequence[Mapping[str, Any]], path: str, item: Any, storage: Storage) -> None:
    """Adds the objects of each image; raises `InvalidInputError` for a missing or unknown key."""
    for index, image in enumerate(images):
        _put_objects(f"{path}.ground_truth[{index}]", image, item.ground_truth.add(), storage)


def _refused(field: str, error: TensorError) -> Exception:
    reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
    return refused_here(reason, str(error), field=field, **error.values)


def _put_objects(
    field: str, image: Mapping[str, Any], objects: losses_pb2.GroundTruth, storage: Storage
) -> None:
    known = objects.DESCRIPTOR.fields_by_name
    for key in image:
        if key not in known:
            reason = pb.ERROR_REASON_UNEXPECTED_FIELD
            raise refused_here(reason, f"is unknown, want {', '.join(known)}", field=f"{field}.{key}")
    for key in ("boxes", "labels"):
        if key not in image:
            raise refused_here(pb.ERROR_REASON_MISSING_FIELD, "is not set", field=f"{field}.{key}")
    for key, value in image.items():
        if value is not None:
            array = as_array(value)
            # An empty list has no type of its own; numpy makes it float64.
            if not array.size and key == "labels":
                array = array.astype("int64")
            put = put_labels if key == "labels" else put_tensor
            put(f"{field}.{key}", array, getattr(objects, key), storage)
