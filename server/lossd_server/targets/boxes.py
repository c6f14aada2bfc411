"""The boxes of a batch of images, as they are painted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.presets import AssignerRules

Ints = NDArray[np.int64]


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
    if len(objects) == 1 and objects[0].boxes.dtype == kind:
        boxes, crowd = _of_one(objects[0])
    else:
        boxes, crowd = _of_many(objects, kind)
    if crowd.any():
        boxes = boxes.take(~crowd)
    with np.errstate(over="ignore"):
        width, height = (boxes.corners[:, 2:] - boxes.corners[:, :2]).T
        choice = np.argsort(rules.size_key(width, height), kind="stable")
    return boxes.take(choice[::-1])


def _of_one(image: Objects) -> tuple[Boxes, NDArray[np.bool_]]:
    """Returns the boxes of the only image, and which are crowd regions: nothing is copied."""
    count = len(image.labels)
    number = np.zeros(count, np.int64)
    return Boxes(
        corners=image.boxes, image=number, index=np.arange(count), labels=image.labels
    ), image.iscrowd


def _of_many(objects: Sequence[Objects], kind: np.dtype[Any]) -> tuple[Boxes, NDArray[np.bool_]]:
    """Returns the boxes of one type of all images, and which are crowd regions."""
    images = [(number, image) for number, image in enumerate(objects) if image.boxes.dtype == kind]
    counts = [len(image.labels) for _, image in images]
    boxes = Boxes(
        corners=np.concatenate([np.zeros((0, 4), kind), *(image.boxes for _, image in images)]),
        image=np.repeat(np.array([number for number, _ in images], np.int64), counts),
        index=np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)]),
        labels=np.concatenate([np.zeros(0, np.int64), *(image.labels for _, image in images)]),
    )
    return boxes, np.concatenate([np.zeros(0, np.bool_), *(image.iscrowd for _, image in images)])
