"""The objects of an image, as a caller has them and as the assigner wants them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.targets.box_format import BoxFormat
from lossd_server.targets.native_reading import read_natively

_WIDE = ("float64", "int32", "int64", "uint32", "uint64")
"""Types whose values float32 may not hold: their boxes are computed with in float64."""


class GroundTruth(NamedTuple):
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
            if key not in cls._fields:
                raise InvalidInputError(Reason.UNEXPECTED_FIELD, "is unknown", field=f"{field}.{key}")
        # Lists have neither type nor shape of their own; numpy gives them both.
        arrays = {key: np.asarray(v) if isinstance(v, list) else v for key, v in objects.items()}
        return cls(**arrays)


class Objects(NamedTuple):
    """Checked objects of one image on the host, in contiguous arrays.

    Attributes:
        boxes: xyxy, `[N, 4]` float32 or float64.
        labels: `[N]`.
        iscrowd: `[N]`; None where there is no crowd region.
    """

    boxes: NDArray[Any]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.bool_] | None

    def crowd_boxes(self) -> NDArray[Any]:
        """Returns the boxes of crowd regions."""
        return self.boxes[:0] if self.iscrowd is None else self.boxes[self.iscrowd]


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
    found = read_natively(ground_truth.boxes, ground_truth.labels, box_format, num_classes)
    if found is None:  # as they are not in order, or of a type that is read in numpy alone
        boxes = _read_boxes(ground_truth.boxes, box_format, f"{field}.boxes")
        found = boxes, _read_labels(ground_truth.labels, f"{field}.labels", len(boxes), num_classes)
    boxes, labels = found
    iscrowd = _read_iscrowd(ground_truth.iscrowd, f"{field}.iscrowd", len(boxes))
    return Objects(boxes=boxes, labels=labels, iscrowd=iscrowd)


def _read_labels(labels: Any, field: str, count: int, num_classes: int | None) -> NDArray[np.int64]:
    if count:  # no labels at all are often an empty list, which has the wrong type
        checks.require_dtype(field, labels, checks.INTEGERS)
    checks.require_shape(field, labels, [count])
    checks.require_labels(field, labels, num_classes=num_classes, lowest=0)
    return checks.host_array(labels).astype(np.int64, order="C")


def _read_iscrowd(iscrowd: Any, field: str, count: int) -> NDArray[np.bool_] | None:
    if iscrowd is None:
        return None
    checks.require_dtype(field, iscrowd, ("bool", *checks.INTEGERS))
    checks.require_shape(field, iscrowd, [count])
    crowd = checks.host_array(iscrowd).astype(np.bool_, order="C")
    return crowd if crowd.any() else None


def _read_boxes(given: Any, box_format: BoxFormat, field: str) -> NDArray[Any]:
    checks.require_dtype(field, given, (*checks.FLOATS, *checks.INTEGERS))
    if list(given.shape) == [0]:  # an image without objects is often an empty list
        return np.zeros((0, 4), np.float32)
    checks.require_shape(field, given, ["N", 4])
    wide = checks.dtype_name(given) in _WIDE
    given_boxes = checks.host_array(given).astype(np.float64 if wide else np.float32, order="C")
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
