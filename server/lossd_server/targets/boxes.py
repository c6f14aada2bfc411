"""The boxes of a batch of images, as they are painted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.presets import AssignerRules

Ints = NDArray[np.int64]

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """The boxes of all images in one row, in the order in which they are painted.

    Attributes:
        corners: `[M, 4]` x1 y1 x2 y2, float32 or float64.
        image: Image of each, `[M]`.
        index: Its place among the boxes of its image, `[M]`.
        labels: Its class, `[M]`.
    """

    corners: NDArray[Any]
    image: Ints
    index: Ints
    labels: Ints

    def take(self, keep: NDArray[Any]) -> "Boxes":
        """Returns some of the boxes."""
        return Boxes(
            corners=self.corners[keep],
            image=self.image[keep],
            index=self.index[keep],
            labels=self.labels[keep],
        )


def in_paint_order(objects: Sequence[Objects], kind: np.dtype[Any], rules: AssignerRules) -> Boxes:
    """Returns the ordinary boxes of one type, from last to first choice."""
    boxes = _ordinary(objects, kind)
    with np.errstate(over="ignore"):
        width, height = (boxes.corners[:, 2:] - boxes.corners[:, :2]).T
        choice = np.argsort(rules.size_key(width, height), kind="stable")
    return boxes.take(choice[::-1])


def _ordinary(objects: Sequence[Objects], kind: np.dtype[Any]) -> Boxes:
    """Returns the boxes of one type of all images, those of crowd regions left out."""
    parts = [Boxes(corners=np.zeros((0, 4), kind), image=_NONE, index=_NONE, labels=_NONE)]
    for number, image in enumerate(objects):
        if image.boxes.dtype == kind:
            index = np.arange(len(image.labels)) if image.iscrowd is None else np.flatnonzero(~image.iscrowd)
            parts.append(
                Boxes(
                    corners=image.boxes[index],
                    image=np.full(len(index), number),
                    index=index,
                    labels=image.labels[index],
                )
            )
    return Boxes(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in Boxes.__slots__}
    )
