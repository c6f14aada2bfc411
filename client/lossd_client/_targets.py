"""What both clients hand out of assignments: reads answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from lossd.target_answers import read_sparse_targets
from lossd.tensors import TensorError, unpack
from lossd.v1 import loss_service_pb2 as pb
from lossd.v1 import losses_pb2
from lossd.v1.tensor_pb2 import Tensor
from lossd.wire import Parcel, Payloads
from lossd_client._arrays import Array
from lossd_client._reading import optional_array, preset_name, timings_of

_read_size = attrgetter("height", "width")

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)

_NONE_IGNORED: Array = np.ndarray((0, 4), _INT32, b"")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLevel:
    """Targets of one level: `cls` and `centerness` `[B, H, W]`, `reg` `[B, 4, H, W]`.

    `ignored` `[B, H, W]` marks locations in crowd regions; None when there are none.
    """

    cls: Array
    reg: Array
    centerness: Array
    ignored: Array | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTargets:
    """Targets of every location, level by level.

    Attributes:
        levels: In the order of the strides.
        positive_counts: Positive locations of each level.
        feature_sizes: Height and width of each level.
        preset: Whose rules these are.
        timings: Seconds that the server spent in each stage.
    """

    levels: tuple[DenseLevel, ...]
    positive_counts: tuple[int, ...]
    feature_sizes: tuple[tuple[int, int], ...]
    preset: str
    timings: Mapping[str, float]

    @property
    def cls(self) -> tuple[Array, ...]:
        """Classes, one array a level: the `cls_targets` of an FCOS loss."""
        return tuple(level.cls for level in self.levels)

    @property
    def reg(self) -> tuple[Array, ...]:
        """Distances, one array a level: the `reg_targets` of an FCOS loss."""
        return tuple(level.reg for level in self.levels)

    @property
    def centerness(self) -> tuple[Array, ...]:
        """Centerness, one array a level: the `centerness_targets` of an FCOS loss."""
        return tuple(level.centerness for level in self.levels)

    @property
    def ignored(self) -> tuple[Array, ...]:
        """What lies in crowd regions, one array a level: the `ignored_targets`; empty without any."""
        return tuple(level.ignored for level in self.levels if level.ignored is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """Targets of the positive locations, ordered by image, level, row, column.

    Attributes:
        locations: Image, level, row and column of each, `[P, 4]` int32.
        labels: `[P]` int64.
        ltrb: Distances in pixels, `[P, 4]` float32.
        centerness: `[P]` float32.
        matched: Index of each one's box among the boxes of its image, `[P]` int32.
        ignored: Image, level, row and column of each location in a crowd region, `[Q, 4]` int32.
        positive_counts: Positive locations of each level.
        feature_sizes: Height and width of each level.
        preset: Whose rules these are.
        timings: Seconds that the server spent in each stage.
    """

    locations: Array
    labels: Array
    ltrb: Array
    centerness: Array
    matched: Array
    ignored: Array
    positive_counts: tuple[int, ...]
    feature_sizes: tuple[tuple[int, int], ...]
    preset: str
    timings: Mapping[str, float]


def read_targets(answer: Parcel[pb.AssignTargetsResponse]) -> DenseTargets | SparseTargets:
    """Returns the targets of the one item of a request; raises `TensorError` where they are none."""
    response, payloads = answer.message, answer.payloads
    if len(response.results) != 1:
        raise TensorError("INVALID_TENSOR", f"it has {len(response.results)} results, want 1")
    (result,) = response.results
    about = _about(result, response)
    if result.WhichOneof("targets") == "dense":
        levels = tuple(_dense_level(level, payloads) for level in result.dense.levels)
        return DenseTargets(levels=levels, **about)
    sparse = result.sparse
    return SparseTargets(
        locations=_integers(sparse.locations, payloads, _INT32),
        labels=_integers(sparse.labels, payloads, _INT64),
        ltrb=unpack(sparse.ltrb, payloads),
        centerness=unpack(sparse.centerness, payloads),
        matched=_integers(sparse.matched, payloads, _INT32),
        ignored=_integers(sparse.ignored, payloads, _INT32),
        **about,
    )


def read_usual_targets(data: bytes) -> SparseTargets | None:
    """Returns the targets that an answer of one item holds; None where their layout is not the usual."""
    found = read_sparse_targets(data)
    if found is None:
        return None
    locations, labels, ltrb, centerness, matched = found.tensors
    return SparseTargets(
        locations=locations,
        labels=labels,
        ltrb=ltrb,
        centerness=centerness,
        matched=matched,
        ignored=_NONE_IGNORED,
        **_about(found.about, found.rest),
    )


def _about(result: pb.TargetResult, answer: pb.AssignTargetsResponse) -> dict[str, Any]:
    """Returns what there is to targets beside tensors."""
    return {
        "positive_counts": tuple(result.positive_counts),
        "feature_sizes": tuple(map(_read_size, result.feature_sizes)),
        "preset": preset_name(losses_pb2.AssignerPreset, result.preset),
        "timings": timings_of(answer.timings),
    }


def _dense_level(level: pb.DenseLevel, payloads: Payloads) -> DenseLevel:
    return DenseLevel(
        cls=_integers(level.cls, payloads, _INT64),
        reg=unpack(level.reg, payloads),
        centerness=unpack(level.centerness, payloads),
        ignored=optional_array(level, "ignored", payloads),
    )


def _integers(tensor: Tensor, payloads: Payloads, dtype: np.dtype[Any]) -> Array:
    """Returns integers that may have come in a smaller type, where they fitted."""
    array = unpack(tensor, payloads)
    if array.dtype.kind != "i" or array.itemsize >= dtype.itemsize:
        return array
    array = array.astype(dtype)
    array.flags.writeable = False
    return array
