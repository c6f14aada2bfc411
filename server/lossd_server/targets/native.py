"""The compiled painter, called with numpy arrays."""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.kernels import loaded_library
from lossd_server.targets.boxes import Boxes
from lossd_server.targets.positives import MAX_PAIRS, Positives, require_pairs, require_positives
from lossd_server.targets.presets import AssignerRules
from lossd_server.targets.pyramid import Pyramid

Ranges = tuple[tuple[float, float], ...]


class _Job(ctypes.Structure):
    """`paint_job` of paint.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("corners", "images", "labels", "indices", "strides", "heights", "widths", "starts")
        ),
        *((name, ctypes.c_void_p) for name in ("lower", "upper", "canvas")),
        *((name, ctypes.c_int64) for name in ("boxes", "levels", "locations")),
        *((name, ctypes.c_double) for name in ("offset", "least_extent")),
        *((name, ctypes.c_int32) for name in ("narrow", "lower_included", "upper_included")),
    )


class _Positives(ctypes.Structure):
    """`positives` of paint.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "images",
            "locations",
            "labels",
            "cells",
            "matched",
            "ltrb",
            "centerness",
            "level_counts",
        )
    )


def assign_natively(
    boxes: Boxes,
    batch_size: int,
    levels: Pyramid,
    ranges: Ranges,
    rules: AssignerRules,
    max_positives: int | None,
) -> Positives | None:
    """Returns the positives of boxes of one type, by the compiled painter; None where there is none."""
    library = loaded_library()
    if library is None:
        return None
    corners = np.ascontiguousarray(boxes.corners, np.float64)
    canvas = np.empty((batch_size, levels.location_count), np.int32)
    job = _Job(
        *map(_address, (corners, boxes.image, boxes.labels, boxes.index)),
        *_level_addresses(levels),
        *_end_addresses(ranges, boxes.corners.dtype),
        _address(canvas),
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
    count = library.lossd_paint(reference, batch, ctypes.c_int64(MAX_PAIRS))
    if count < 0:
        require_pairs(~count)
    require_positives(count, max_positives)
    found, places = _room(count, len(levels.strides))
    library.lossd_positives(reference, batch, ctypes.byref(places))
    return found


def _room(count: int, levels: int) -> tuple[Positives, _Positives]:
    """Returns arrays for so many positives, their elements not set, and where they lie."""
    longs = np.empty(3 * count + levels, np.int64)
    words, floats = np.empty((5, count), np.int32), np.empty((5, count), np.float32)
    long, word, number = _address(longs), _address(words), _address(floats)
    found = Positives(
        image=longs[:count],
        location=longs[count : 2 * count],
        labels=longs[2 * count : 3 * count],
        cells=words[:4].reshape(count, 4),
        matched=words[4],
        ltrb=floats[:4].reshape(count, 4),
        centerness=floats[4],
        level_counts=longs[3 * count :],
    )
    three = (long + 8 * count * place for place in range(3))
    places = _Positives(*three, word, word + 16 * count, number, number + 16 * count, long + 24 * count)
    return found, places


@lru_cache(maxsize=256)
def _level_addresses(levels: Pyramid) -> tuple[int, ...]:
    """Returns where the arrays of a pyramid lie, which is kept as long as that is known here."""
    return tuple(map(_address, (levels.strides, levels.heights, levels.widths, levels.starts)))


def _end_addresses(ranges: Ranges, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Returns where the lower and the upper ends of ranges lie, rounded to a type."""
    ends, address = _rounded(ranges, dtype)
    return address, address + ends.strides[0]


@lru_cache(maxsize=256)
def _rounded(ranges: Ranges, dtype: np.dtype[Any]) -> tuple[NDArray[np.float64], int]:
    with np.errstate(over="ignore"):  # a range may end beyond float32, and is then endless
        ends = np.ascontiguousarray(np.array(ranges, np.float64).T.astype(dtype), np.float64)
    return ends, _address(ends)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # `array.ctypes` takes four times as long
    return address
