"""Whatever a caller holds, as fields of a request: pieces that refer to it, as `lossd.writing` has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lossd.gpu_memory import GpuArray
from lossd.narrow import narrowed_integers
from lossd.tensors import TensorError
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.writing import Piece, message_field, tags_of
from lossd_client._arrays import as_array
from lossd_client._errors import refused_here
from lossd_client._storage import Storage

_OBJECTS = tags_of(losses_pb2.GroundTruth.DESCRIPTOR)


def pack_tensor(field: str, tag: bytes, value: Any, storage: Storage, *, on_gpu: bool = False) -> list[Piece]:
    """Returns the tensor of a value; raises `InvalidInputError` by field.

    Args:
        field: Where it stands in the request.
        tag: The tag of the field.
        value: The value.
        storage: Where it is to lie.
        on_gpu: Whether a shared array of a GPU is taken where it lies; if not, a copy is sent.
    """
    is_there = on_gpu and isinstance(value, GpuArray)
    try:
        return storage.pack(field, tag, value if is_there else as_array(value))
    except TensorError as error:
        raise _refused(field, error) from error


def pack_prediction(
    field: str, tag: bytes, value: Any, storage: Storage, *, keep: bool = False
) -> list[Piece]:
    """Does the same for a prediction, in the form in which predictions travel.

    Args:
        field: As above, like the next three.
        tag: The tag of the field.
        value: The prediction.
        storage: Where it is to lie.
        keep: Whether it is sent in its own type whatever the form.
    """
    try:
        is_there = isinstance(value, GpuArray) and not storage.form.is_narrow
        array = value if is_there else as_array(value)
        return storage.pack(field, tag, storage.form.prediction(field, array, keep=keep))
    except TensorError as error:
        raise _refused(field, error) from error


def pack_labels(field: str, tag: bytes, value: Any, storage: Storage) -> list[Piece]:
    """Does the same for labels: in the smallest type that holds them, unless they lie in shared memory."""
    try:
        return storage.pack(field, tag, as_array(value), narrowed_integers)
    except TensorError as error:
        raise _refused(field, error) from error


def pack_ground_truth(
    field: str, tag: bytes, images: Sequence[Mapping[str, Any]], storage: Storage
) -> list[Piece]:
    """Returns the objects of each image.

    Args:
        field: Where they stand in the request.
        tag: The tag of the field, which is repeated.
        images: For each image its objects by key.
        storage: Where they are to lie.

    Raises:
        InvalidInputError: A key is missing or unknown, or no tensor of the contract.
    """
    pieces: list[Piece] = []
    for index, image in enumerate(images):
        pieces += message_field(tag, _objects(f"{field}[{index}]", image, storage))
    return pieces


def _refused(field: str, error: TensorError) -> Exception:
    reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
    return refused_here(reason, str(error), field=field, **error.values)


def _objects(field: str, image: Mapping[str, Any], storage: Storage) -> list[Piece]:
    for key in image:
        if key not in _OBJECTS:
            reason = pb.ERROR_REASON_UNEXPECTED_FIELD
            raise refused_here(reason, f"is unknown, want {', '.join(_OBJECTS)}", field=f"{field}.{key}")
    for key in ("boxes", "labels"):
        if key not in image:
            raise refused_here(pb.ERROR_REASON_MISSING_FIELD, "is not set", field=f"{field}.{key}")
    pieces: list[Piece] = []
    for key, value in image.items():
        if key == "labels" and value is not None:
            labels = as_array(value)
            # An empty list has no type of its own; numpy makes it float64.
            given = labels if labels.size else labels.astype("int64")
            pieces += pack_labels(f"{field}.{key}", _OBJECTS[key], given, storage)
        elif value is not None:
            pieces += pack_tensor(f"{field}.{key}", _OBJECTS[key], value, storage)
    return pieces
