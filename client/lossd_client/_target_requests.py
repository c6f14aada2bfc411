"""What both clients send of assignments."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from lossd.v1 import loss_service_pb2 as pb
from lossd.wire import Parcel
from lossd.writing import Piece, message_field, tags_of
from lossd_client._arrays import as_array
from lossd_client._calls import Call
from lossd_client._config import whole_number
from lossd_client._fcos_configs import FCOSAssigner
from lossd_client._maps import DenseForm, dense_targets
from lossd_client._packing import pack_ground_truth
from lossd_client._storage import Storage
from lossd_client._streams import Stream
from lossd_client._targets import DenseTargets, SparseTargets, read_targets, read_usual_targets

_ITEM = tags_of(pb.AssignTargetsRequest.DESCRIPTOR)["items"]
_GROUND_TRUTH = tags_of(pb.AssignItem.DESCRIPTOR)["ground_truth"]


def assign_call(
    assigner: FCOSAssigner, ground_truth: Sequence[Any], **settings: Any
) -> Call[DenseTargets | SparseTargets]:
    """Returns the call for the targets of a batch of images; settings as for `assign_request`."""
    storage = Storage(None)
    return Call(
        method="AssignTargets",
        request=assign_request(assigner, ground_truth, storage=storage, **settings),
        read=partial(_read_targets, storage=storage),
        storage=storage,
        read_usual=partial(_read_usual, storage=storage),
    )


def assign_request(
    assigner: FCOSAssigner,
    ground_truth: Sequence[Any],
    *,
    image_size: tuple[int, int] | None,
    feature_sizes: Sequence[tuple[int, int]] | None,
    sparse: bool,
    storage: Storage,
) -> list[Piece]:
    """Returns the request for the targets of a batch of images of one size."""
    head = _head(assigner, sparse=sparse)
    objects = pack_ground_truth("items[0].ground_truth", _GROUND_TRUTH, ground_truth, storage)
    sizes = () if feature_sizes is None else tuple(map(_size, feature_sizes))
    about = _about(None if image_size is None else _size(image_size), sizes)
    if not sparse:
        crowds = (image.get("iscrowd") for image in ground_truth)
        has_crowd = any(crowd is not None and as_array(crowd).any() for crowd in crowds)
        storage.dense_form = DenseForm(batch_size=len(ground_truth), has_crowd=has_crowd)
    return [head, *message_field(_ITEM, [*objects, about])]


def assign_stream(
    assigner: FCOSAssigner, *, window: int, return_exceptions: bool, **settings: Any
) -> Stream[DenseTargets | SparseTargets]:
    """Returns the stream of assignments, each given by its ground truth; settings as for `assign_request`."""
    return Stream(
        method="AssignTargets",
        make=lambda ground_truth, storage: assign_request(
            assigner, ground_truth, storage=storage, **settings
        ),
        read=_read_targets,
        window=window,
        return_exceptions=return_exceptions,
    )


@lru_cache(maxsize=64)
def _head(assigner: FCOSAssigner, *, sparse: bool) -> bytes:
    """Returns what a request has beside items."""
    request = pb.AssignTargetsRequest(
        assigner=assigner.message(),
        format=pb.TARGET_FORMAT_SPARSE if sparse else pb.TARGET_FORMAT_SMALLER,
        narrow_integers=True,
    )
    return request.SerializeToString()


@lru_cache(maxsize=256)
def _about(image_size: tuple[int, int] | None, feature_sizes: tuple[tuple[int, int], ...]) -> bytes:
    """Returns what an item has beside objects."""
    about = pb.AssignItem(
        image_size=None if image_size is None else _size_message(image_size),
        feature_sizes=map(_size_message, feature_sizes),
    )
    return about.SerializeToString()


def _read_targets(answer: Parcel[pb.AssignTargetsResponse], storage: Storage) -> DenseTargets | SparseTargets:
    return _as_asked(read_targets(answer), storage)


def _read_usual(data: bytes, storage: Storage) -> DenseTargets | SparseTargets | None:
    targets = read_usual_targets(data)
    return None if targets is None else _as_asked(targets, storage)


def _as_asked(targets: DenseTargets | SparseTargets, storage: Storage) -> DenseTargets | SparseTargets:
    """Returns targets as the caller wants them, who was sent what is smaller."""
    if storage.dense_form is None or isinstance(targets, DenseTargets):
        return targets
    return dense_targets(targets, storage.dense_form)


def _size_message(size: tuple[int, int]) -> pb.Size:
    height, width = size
    return pb.Size(height=height, width=width)


def _size(size: Sequence[int]) -> tuple[int, int]:
    """Returns a size as plain numbers, which cannot be changed and are told apart."""
    height, width = size
    return whole_number(height), whole_number(width)
