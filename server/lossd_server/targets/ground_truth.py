"""The objects of an image, as a caller has them and as the assigner wants them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason

_WIDE = ("float64", "int32", "int64", "uint32", "uint64")
"""Types whose values float32 may not hold: their boxes are computed with in float64."""


class BoxFormat(StrEnum):
    """The layout of a box's four numbers."""

    XYXY = "xyxy"
    """Left, top, right, bottom."""
    XYWH = "xywh"
    """Left, top, width, height (COCO)."""
    CXCYWH = "cxcywh"
    """Centre x, centre y, width, height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundTruth:
    """The objects of one image.

    Attributes:
        boxes: `[N, 4]`, pixels, in the assigner's box format, any float or integer type.
        labels: `[N]`, any integer type, 0 and above.
        iscrowd: Optional `[N]`, bool or integer, true for a COCO crowd region.
    """

    boxes: Any
    labels: Any
    iscrowd: Any = None

    @classmethod
    def of(cls, objects: "GroundTruth | Mapping[str, Any]", field: str) -> Self:
        """Returns `objects`, or the ground truth that a mapping with the keys `boxes` and `labels` holds.

        Raises:
            InvalidInputError: A key is missing or unknown.
        """
        if isinstance(objects, cls):
            return objects
        if not isinstance(objects, Mapping):
            raise InvalidInputError(
                Reason.MISSING_FIELD,
                f"is {type(objects).__name__}, want a mapping with boxes and labels",
                field=field,
                type=type(objects).__name__,
            )
        for key in ("boxes", "labels"):
            if key not in objects:
                raise InvalidInputError(Reason.MISSING_FIELD, "is not set", field=f"{field}.{key}")
        for key in objects:
            if key not in cls.__slots__:
                raise InvalidInputError(Reason.UNEXPECTED_FIELD, "is unknown", field=f"{field}.{key}")
        # Lists have neither type nor shape of their own; numpy gives them both.
        arrays = {key: np.asarray(v) if isinstance(v, list) else v for key, v in objects.items()}
        return cls(**arrays)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """Checked objects of one image on the host: xyxy boxes, float32 or float64, and int64 labels."""

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.bool_]


def read_objects(
    ground_truth: GroundTruth, box_format: BoxFormat, *, field: str, num_classes: int | None
) -> Objects:
    """Checks one image's ground truth and returns it in the assigner's terms.

    Args:
        ground_truth: The objects, numpy or torch.
        box_format: Layout of the boxes.
        field: Path of this image, for errors.
        num_classes: Number of classes, or None where any label from 0 goes.

    Raises:
        InvalidInputError: A wrong type or shape, a label out of range, a box that is inverted or
            not finite.
    """
    boxes = _read_boxes(ground_truth.boxes, box_format, f"{field}.boxes")
    if len(boxes):  # no labels at all are often an empty list, which has the wrong type
        checks.require_dtype(f"{field}.labels", ground_truth.labels, checks.INTEGERS)
    checks.require_shape(f"{field}.labels", ground_truth.labels, [len(boxes)])
    checks.require_labels(f"{field}.labels", ground_truth.labels, num_classes=num_classes, lowest=0)
    iscrowd = np.zeros(len(boxes), np.bool_)
    if ground_truth.iscrowd is not None:
        checks.require_dtype(f"{field}.iscrowd", ground_truth.iscrowd, ("bool", *checks.INTEGERS))
        checks.require_shape(f"{field}.iscrowd", ground_truth.iscrowd, [len(boxes)])
        iscrowd = checks.host_array(ground_truth.iscrowd).astype(np.bool_)
    labels = checks.host_array(ground_truth.labels).astype(np.int64)
    return Objects(boxes=boxes, labels=labels, iscrowd=iscrowd)


def _read_boxes(given: Any, box_format: BoxFormat, field: str) -> NDArray[Any]:
    checks.require_dtype(field, given, (*checks.FLOATS, *checks.INTEGERS))
    if list(given.shape) == [0]:  # an image without objects is often an empty list
        return np.zeros((0, 4), np.float32)
    checks.require_shape(field, given, ["N", 4])
    wide = checks.dtype_name(given) in _WIDE
    given_boxes = checks.host_array(given).astype(np.float64 if wide else np.float32)
    checks.require_finite(field, given_boxes)
    with np.errstate(over="ignore"):  # what overflows is refused just below
        boxes = _to_xyxy(given_boxes, box_format)
        if wide or boxes is not given_boxes:
            checks.require_finite(field, boxes.astype(np.float32))
    checks.require_upright_boxes(field, boxes)
    return boxes


def _to_xyxy(boxes: NDArray[Any], box_format: BoxFormat) -> NDArray[Any]:
    first, second = boxes[:, :2], boxes[:, 2:]
    if box_format is BoxFormat.XYWH:
        return np.concatenate([first, first + second], axis=1)
    if box_format is BoxFormat.CXCYWH:
        half = second / 2
        return np.concatenate([first - half, first + half], axis=1)
    return boxes
