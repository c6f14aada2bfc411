"""The compiled painter, called with numpy arrays."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.kernels import loaded_library
from lossd_server.targets.boxes import Boxes
from lossd_server.targets.positives import Positives, require_pairs, require_positives
from lossd_server.targets.presets import AssignerRules
from lossd_server.targets.pyramid import Pyramid


class _Job(ctypes.Structure):
    """`paint_job` of paint.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("corners", "images", "strides", "heights", "widths", "starts")
        ),
        *((name, ctypes.c_void_p) for name in ("lower", "upper", "canvas")),
        *((name, ctypes.c_int64) for name in ("boxes", "levels", "locations")),
        *((name, ctypes.c_double) for name in ("offset", "least_extent")),
        *((name, ctypes.c_int32) for name in ("narrow", "lower_included", "upper_included")),
    )


class _Positives(ctypes.Structure):
    """`positives` of paint.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("images", "locations", "boxes", "ltrb", "centerness")
    )


def assign_natively(
    boxes: Boxes,
    batch_size: int,
    levels: Pyramid,
    bounds: NDArray[np.float64],
    rules: AssignerRules,
    max_positives: int | None,
) -> Positives | None:
    """Returns the positives of boxes of one type, by the compiled painter; None where there is none."""
    library = loaded_library()
    if library is None:
        return None
    corners = np.ascontiguousarray(boxes.corners, np.float64)
    images = np.ascontiguousarray(boxes.image)
    with np.errstate(over="ignore"):  # a range may end beyond float32, and is then endless
        lower, upper = np.ascontiguousarray(bounds.astype(boxes.corners.dtype), np.float64)
    canvas = np.empty((batch_size, levels.location_count), np.int32)
    arrays = (
        corners,
        images,
        levels.strides,
        levels.heights,
        levels.widths,
        levels.starts,
        lower,
        upper,
        canvas,
    )
    job = _Job(
        *map(_address, arrays),
        len(corners),
        len(levels.strides),
        levels.location_count,
        rules.offset,
        rules.least_extent,
        boxes.corners.dtype == np.float32,
        rules.lower_included,
        rules.upper_included,
    )
    reference, batch = ctypes.byref(job), ctypes.c_int64(batch_size)
    require_pairs(library.lossd_pairs(reference))
    count = library.lossd_paint(reference, batch)
    require_positives(count, max_positives)
    image, location, box = np.empty((3, count), np.int64)
    ltrb, centerness = np.empty((count, 4), np.float32), np.empty(count, np.float32)
    found = _Positives(*map(_address, (image, location, box, ltrb, centerness)))
    library.lossd_positives(reference, batch, ctypes.byref(found))
    return Positives(image=image, location=location, box=box, ltrb=ltrb, centerness=centerness)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # `array.ctypes` takes four times as long
    return address
