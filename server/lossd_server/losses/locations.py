"""What an FCOS loss wants at each location of the pyramid, from dense targets or from ground truth.

Read on the host, where boxes and labels come from and are checked.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.checks import host_array
from lossd_server.targets import Assignment


class LevelTargets(NamedTuple):
    """Targets of B images on one level of S locations, of which P are positive.

    Attributes:
        labels: Class of each location, `[B, S]`, any integer type; negative without an object.
        ignored: Locations without an object that take no part whatever the preset, `[B, S]` bool,
            or None.
        image: Image of each positive, `[P]` int64.
        cell: Place of each positive on the level, `[P]` int64.
        ltrb: Target distances of each positive, `[P, 4]`, any float type.
        centerness: Target centerness of each positive, `[P]`, any float type.
    """

    labels: NDArray[Any]
    ignored: NDArray[np.bool_] | None
    image: NDArray[np.int64]
    cell: NDArray[np.int64]
    ltrb: NDArray[Any]
    centerness: NDArray[Any]

    @property
    def positive_count(self) -> int:
        """Number of positives P."""
        return len(self.cell)

    @property
    def places(self) -> NDArray[np.int64]:
        """Places of the positives along `[B, S]`, ascending."""
        places: NDArray[np.int64] = self.image * self.labels.shape[1] + self.cell
        return places

    @property
    def location_count(self) -> int:
        """Locations that are a positive or background."""
        return self.labels.size - (0 if self.ignored is None else int(np.count_nonzero(self.ignored)))


def from_dense(
    cls_targets: Sequence[NDArray[Any]],
    reg_targets: Sequence[NDArray[Any]],
    centerness_targets: Sequence[NDArray[Any]],
    ignored_targets: Sequence[NDArray[Any]] | None,
) -> list[LevelTargets]:
    """Returns the targets that dense maps hold, `[B, H, W]` a level, distances `[B, 4, H, W]`."""
    ignored = ignored_targets or repeat(None, len(cls_targets))
    maps = zip(cls_targets, reg_targets, centerness_targets, ignored, strict=True)
    return [_level_from_dense(*level) for level in maps]


def from_assignment(assignment: Assignment) -> list[LevelTargets]:
    """Returns the targets that an assignment found."""
    labels, ignored, found = assignment.label_map(), assignment.ignored, assignment.found
    image, location = found.places(assignment.pyramid)
    order = np.argsort(found.cells[:, 1], kind="stable")  # of levels, and of images within each
    image, location = image[order], location[order]
    ltrb, centerness = found.ltrb[order], found.centerness[order]
    starts, ends = assignment.pyramid.starts.tolist(), np.cumsum(found.level_counts).tolist()
    levels = []
    for level, end in enumerate(ends):
        span, here = slice(starts[level], starts[level + 1]), slice(end - found.level_counts[level], end)
        levels.append(
            LevelTargets(
                labels=labels[:, span],
                ignored=None if ignored is None else ignored[:, span],
                image=image[here],
                cell=location[here] - span.start,
                ltrb=ltrb[here],
                centerness=centerness[here],
            )
        )
    return levels


def host_levels(levels: Sequence[Any]) -> list[NDArray[Any]]:
    """Returns the values of maps, one a level, as numpy; from a GPU in one copy, and so with one wait."""
    if not all(isinstance(level, Tensor) and level.is_cuda for level in levels):
        return [host_array(level) for level in levels]
    flat = host_array(torch.cat([level.flatten() for level in levels]))
    ends = np.cumsum([level.numel() for level in levels])[:-1]
    parts = zip(np.split(flat, ends), levels, strict=True)
    return [part.reshape(tuple(level.shape)) for part, level in parts]


def _level_from_dense(
    cls_target: NDArray[Any],
    reg_target: NDArray[Any],
    centerness_target: NDArray[Any],
    ignored_target: NDArray[Any] | None,
) -> LevelTargets:
    batch, locations = len(cls_target), cls_target[0].size if len(cls_target) else 0
    labels = np.ascontiguousarray(cls_target).reshape(batch, locations)
    image, cell = np.nonzero(labels >= 0)
    ignored = None
    if ignored_target is not None:
        ignored = ignored_target.reshape(batch, locations) & (labels < 0)
    row, column = np.divmod(cell, max(cls_target.shape[2], 1))
    return LevelTargets(
        labels=labels,
        ignored=ignored,
        image=image,
        cell=cell,
        ltrb=reg_target[image, :, row, column],
        centerness=centerness_target[image, row, column],
    )
