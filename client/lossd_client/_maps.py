"""Dense targets out of sparse ones, which are a fraction of their size on the wire."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import grpc
import numpy as np

from lossd_client._arrays import Array
from lossd_client._errors import ServerError
from lossd_client._targets import DenseLevel, DenseTargets, SparseTargets

_UNASSIGNED = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseForm:
    """What an answer of sparse targets does not say of the dense ones.

    Attributes:
        batch_size: Number of images.
        has_crowd: Whether any of their boxes is a crowd region.
    """

    batch_size: int
    has_crowd: bool


def dense_targets(sparse: SparseTargets, form: DenseForm) -> DenseTargets:
    """Returns the targets of every location, as the server would have sent them.

    Raises:
        ServerError: A location is on no level, or there is not one of everything for each.
    """
    extents = np.array([(form.batch_size, *size) for size in sparse.feature_sizes], np.int64).reshape(-1, 3)
    _check(sparse, extents)
    shapes: list[list[int]] = extents.tolist()
    return DenseTargets(
        levels=tuple(_dense_level(sparse, level, shape, form) for level, shape in enumerate(shapes)),
        positive_counts=sparse.positive_counts,
        feature_sizes=sparse.feature_sizes,
        preset=sparse.preset,
        timings=sparse.timings,
    )


def _check(sparse: SparseTargets, extents: Array) -> None:
    if (extents < 0).any():
        _refuse(f"feature sizes are {list(sparse.feature_sizes)}, want at least 0")
    count = len(sparse.locations)
    for name, width in (("labels", ()), ("ltrb", (4,)), ("centerness", ())):
        shape = getattr(sparse, name).shape
        if shape != (count, *width):
            _refuse(f"{name} are {list(shape)}, want {[count, *width]}")
    for name in ("locations", "ignored"):
        _check_locations(name, getattr(sparse, name), extents)


def _dense_level(sparse: SparseTargets, level: int, shape: Sequence[int], form: DenseForm) -> DenseLevel:
    batch, height, width = shape
    here = sparse.locations[:, 1] == level
    image, _, row, column = sparse.locations[here].T
    cls = np.full(shape, _UNASSIGNED, np.int64)
    cls[image, row, column] = sparse.labels[here]
    reg = np.zeros((batch, 4, height, width), np.float32)
    reg[image, :, row, column] = sparse.ltrb[here]
    centerness = np.zeros(shape, np.float32)
    centerness[image, row, column] = sparse.centerness[here]
    ignored = None
    if form.has_crowd:
        ignored = np.zeros(shape, np.bool_)
        image, _, row, column = sparse.ignored[sparse.ignored[:, 1] == level].T
        ignored[image, row, column] = True
    for array in (cls, reg, centerness, ignored):
        if array is not None:
            array.flags.writeable = False
    return DenseLevel(cls=cls, reg=reg, centerness=centerness, ignored=ignored)


def _check_locations(name: str, locations: Array, extents: Array) -> None:
    """Raises `ServerError` unless locations are those of a pyramid, in order."""
    if locations.dtype.kind != "i" or locations.shape[1:] != (4,):
        _refuse(f"{name} are {locations.dtype} {list(locations.shape)}, want integers [P, 4]")
    if not len(locations):
        return
    image, level, row, column = locations.astype(np.int64).T
    if not (level.min() >= 0 and level.max() < len(extents)):
        _refuse(f"{name} are on levels {level.min()} to {level.max()}, want 0..{len(extents) - 1}")
    batch, height, width = extents[level].T
    stray = (image < 0) | (image >= batch) | (row < 0) | (row >= height) | (column < 0) | (column >= width)
    if stray.any():
        at = int(stray.argmax())
        _refuse(f"{name}[{at}] is {locations[at].tolist()}, which is outside the pyramid")
    starts = np.concatenate([[0], np.cumsum(extents[:, 1] * extents[:, 2])])
    flat = image * starts[-1] + starts[level] + row * width + column
    if (flat[1:] <= flat[:-1]).any():
        _refuse(f"{name} are not in order")


def _refuse(message: str) -> NoReturn:
    raise ServerError(grpc.StatusCode.INTERNAL, f"the answer's targets make no sense: {message}")
