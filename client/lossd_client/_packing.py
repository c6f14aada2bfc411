"""Whatever a caller holds, as messages of the contract."""

from collections.abc import Mapping, Sequence
from typing import Any

from lossd.tensors import TensorError
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd_client._arrays import as_array
from lossd_client._errors import refused_here
from lossd_client._narrow import narrowed_labels
from lossd_client._storage import Storage


def packed(field: str, value: Any, storage: Storage) -> Any:
    """Returns a value as a `Tensor` that lies in the storage; raises `InvalidInputError` by field."""
    try:
        return storage.tensor(as_array(value))
    except TensorError as error:
        raise _refused(field, error) from error


def packed_prediction(field: str, value: Any, storage: Storage, *, keep: bool = False) -> Any:
    """Returns a prediction likewise, in the form in which predictions travel.

    Args:
        field: Where it stands in the request.
        value: The prediction.
        storage: Where it is to lie.
        keep: Whether it is sent in its own type whatever the form.
    """
    try:
        array = storage.form.prediction(field, as_array(value), keep=keep)
    except TensorError as error:
        raise _refused(field, error) from error
    return packed(field, array, storage)


def packed_labels(field: str, value: Any, storage: Storage) -> Any:
    """Returns labels likewise: in the smallest type that holds them, unless they lie in shared memory."""
    array = as_array(value)
    return packed(field, array if storage.holds(array) else narrowed_labels(array), storage)


def packed_ground_truth(
    images: Sequence[Mapping[str, Any]], path: str, storage: Storage
) -> list[losses_pb2.GroundTruth]:
    """Returns the objects of each image; raises `InvalidInputError` for a missing or unknown key."""
    return [
        _packed_objects(f"{path}.ground_truth[{index}]", image, storage) for index, image in enumerate(images)
    ]


def _refused(field: str, error: TensorError) -> Exception:
    reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
    return refused_here(reason, str(error), field=field, **error.values)


def _packed_objects(field: str, image: Mapping[str, Any], storage: Storage) -> losses_pb2.GroundTruth:
    objects = losses_pb2.GroundTruth()
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
            pack = packed_labels if key == "labels" else packed
            getattr(objects, key).CopyFrom(pack(f"{field}.{key}", array, storage))
    return objects
