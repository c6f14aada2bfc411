"""The objects of an image read by compiled code, in one pass."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.kernels import address_of, loaded_library
from lossd_server.targets.box_format import BoxFormat

_FORMATS = {BoxFormat.XYXY: 0, BoxFormat.XYWH: 1, BoxFormat.CXCYWH: 2}
"""The formats, by their numbers in paint.c."""

_LABEL_TYPES = {np.dtype(name): i for i, name in enumerate(("i1", "u1", "i2", "u2", "i4", "i8"))}
"""Types of labels that are read, likewise."""

_ANY_CLASS = 2**63 - 1

_BOX = 4
_FLOAT32 = np.dtype(np.float32)


def read_natively(
    boxes: Any, labels: Any, box_format: BoxFormat, num_classes: int | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Returns boxes as xyxy and labels as int64, both checked; see `read_objects`.

    None where that does not apply, which is for float32 boxes and common labels in plain numpy arrays, and
    where something is wrong with them.
    """
    library = loaded_library()
    if library is None or not (isinstance(boxes, np.ndarray) and isinstance(labels, np.ndarray)):
        return None
    kind, count = _LABEL_TYPES.get(labels.dtype), len(labels) if labels.ndim == 1 else 0
    if kind is None or boxes.dtype != _FLOAT32 or not count or boxes.shape != (count, _BOX):
        return None
    for flags in (boxes.flags, labels.flags):
        if not (flags.c_contiguous and flags.aligned):
            return None
    read_boxes, read_labels = np.empty((count, _BOX), np.float32), np.empty(count, np.int64)
    classes = _ANY_CLASS if num_classes is None else min(num_classes, _ANY_CLASS)
    in_order = library.lossd_read_objects(
        *(address_of(boxes), _FORMATS[box_format], address_of(labels), kind, count, classes),
        *(address_of(read_boxes), address_of(read_labels)),
    )
    return (read_boxes, read_labels) if in_order else None
