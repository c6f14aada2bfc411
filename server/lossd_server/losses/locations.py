"""What an FCOS loss wants at each location of the pyramid, from dense targets or from ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.checks import host_array
from lossd_server.targets import Assignment


@dataclass(frozen=True, kw_only=True, slots=True)
class LocationTargets:
    """Targets of B images, locations in one flat row: level by level, row by row.

    Attributes:
        labels: Class of each location, `[B, T]` int64; negative without an object.
        ignored: Locations that take no part whatever the preset, `[B, T]` bool, or None.
        starts: Where each level begins in the row; the last entry is T.
        image: Image of each positive, `[P]`.
        location: Place of each positive in the row, `[P]`.
        ltrb: Target distances of each positive, `[P, 4]`.
        centerness: Target centerness of each positive, `[P]`.
    """

    labels: Tensor
    ignored: Tensor | None
    starts: tuple[int, ...]
    image: Tensor
    location: Tensor
    ltrb: Tensor
    centerness: Tensor

    def spans(self) -> list[slice]:
        """Returns where each level lies in the row."""
        return list(map(slice, self.starts[:-1], self.starts[1:]))

    def background_counts(self) -> Tensor:
        """Returns how many locations of each level are background, `[L]` float64."""
        background = self.labels < 0 if self.ignored is None else (self.labels < 0) & ~self.ignored
        return torch.stack([background[:, span].sum() for span in self.spans()]).double()

    def level(self) -> Tensor:
        """Returns the level of each positive, `[P]`."""
        bounds = torch.tensor(self.starts, device=self.location.device)
        return torch.searchsorted(bounds, self.location, right=True) - 1

    def sum_by_level(self, values: Tensor) -> Tensor:
        """Returns the sum of one value a positive over each level, `[L]` float64, in a fixed order."""
        levels = torch.arange(len(self.starts) - 1, device=values.device).unsqueeze(1)
        return torch.where(self.level() == levels, values.double(), 0).sum(dim=1)


def from_dense(
    cls_targets: Sequence[Tensor],
    reg_targets: Sequence[Tensor],
    centerness_targets: Sequence[Tensor],
    ignored_targets: Sequence[Tensor] | None,
) -> LocationTargets:
    """Returns the targets that dense maps hold, `[B, H, W]` a level, distances `[B, 4, H, W]`."""
    labels = _flat([level.to(torch.int64) for level in cls_targets])
    image, location = torch.nonzero(labels >= 0, as_tuple=True)
    ltrb = flat_levels(reg_targets)[image, :, location]
    return LocationTargets(
        labels=labels,
        ignored=_flat(ignored_targets) & (labels < 0) if ignored_targets else None,
        starts=_starts([level[0].numel() if len(level) else 0 for level in cls_targets]),
        image=image,
        location=location,
        ltrb=ltrb,
        centerness=_flat(centerness_targets)[image, location],
    )


def from_assignment(assignment: Assignment, device: torch.device) -> LocationTargets:
    """Returns the targets that an assignment found, on the device of the predictions."""
    ignored = assignment.ignored
    return LocationTargets(
        labels=torch.from_numpy(assignment.label_map()).to(device),
        ignored=None if ignored is None else torch.from_numpy(ignored).to(device),
        starts=tuple(assignment.pyramid.starts.tolist()),
        image=torch.from_numpy(assignment.image).to(device),
        location=torch.from_numpy(assignment.location).to(device),
        ltrb=torch.from_numpy(assignment.ltrb).to(device),
        centerness=torch.from_numpy(assignment.centerness).to(device),
    )


def _flat(levels: Sequence[Tensor]) -> Tensor:
    """Returns maps `[B, H, W]`, one a level, as one `[B, T]`."""
    return torch.cat([level.flatten(1) for level in levels], dim=1)


def flat_levels(levels: Sequence[Tensor]) -> Tensor:
    """Returns maps `[B, K, H, W]`, one a level, as one `[B, K, T]`."""
    return torch.cat([level.flatten(2) for level in levels], dim=2)


def host_levels(levels: Sequence[Any]) -> list[NDArray[Any]]:
    """Returns the values of maps, one a level, as numpy; from a GPU in one copy, and so with one wait."""
    if not all(isinstance(level, Tensor) and level.is_cuda for level in levels):
        return [host_array(level) for level in levels]
    flat = host_array(torch.cat([level.flatten() for level in levels]))
    ends = np.cumsum([level.numel() for level in levels])[:-1]
    parts = zip(np.split(flat, ends), levels, strict=True)
    return [part.reshape(tuple(level.shape)) for part, level in parts]


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.cumsum([0, *sizes]).tolist())
