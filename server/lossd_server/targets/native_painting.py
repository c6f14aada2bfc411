"""The compiled painter, called with numpy arrays."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lossd_server.kernels import address_of, loaded_library
from lossd_server.targets.ground_truth import Objects
from lossd_server.targets.positives import MAX_PAIRS, Positives, require_pairs, require_positives
from lossd_server.targets.presets import AssignerRules, area
from lossd_server.targets.pyramid import Pyramid

Ranges = tuple[tuple[float, float], ...]

_NO_MEMORY = -(2**63)

_INT64, _INT32, _FLOAT32 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float32)


class _Image(ctypes.Structure):
    """`image_objects` of paint.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("boxes", "labels", "crowd")),
        *((name, ctypes.c_int64) for name in ("count", "narrow")),
    )


class _Job(ctypes.Structure):
    """`paint_job` of paint.c."""

    _fields_ = (
        ("images", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("strides", "heights", "widths", "starts")),
        *((name, ctypes.c_void_p) for name in ("wide_ends", "narrow_ends", "canvas")),
        *((name, ctypes.c_int64) for name in ("batch", "levels", "locations")),
        *((name, ctypes.c_double) for name in ("offset", "least_extent")),
        *((name, ctypes.c_int32) for name in ("lower_included", "upper_included")),
    )


class _Positives(ctypes.Structure):
    """`positives` of paint.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "labels",
            "cells",
            "matched",
            "ltrb",
            "centerness",
            "level_counts",
        )
    )


def assign_natively(
    objects: Sequence[Objects],
    levels: Pyramid,
    ranges: Ranges,
    rules: AssignerRules,
    max_positives: int | None,
) -> Positives | None:
    """Returns the positives of a batch of images by the compiled painter; None where there is none."""
    library = loaded_library()
    if library is None or rules.size_key is not area:
        return None
    canvas = np.empty((len(objects), levels.location_count), np.int32)
    ends = _ends(ranges)  # to be held meanwhile: others may have it forgotten
    images = (_Image * len(objects))(*map(_image, objects))
    job = _Job(
        ctypes.addressof(images),
        *_level_addresses(levels),
        address_of(ends),
        address_of(ends) + ends.strides[0],
        address_of(canvas),
        len(objects),
        len(levels.strides),
        levels.location_count,
        rules.offset,
        rules.least_extent,
        rules.lower_included,
        rules.upper_included,
    )
    reference = ctypes.byref(job)
    count = library.lossd_paint(reference, MAX_PAIRS)
    if count == _NO_MEMORY:
        raise MemoryError
    if count < 0:
        require_pairs(~count)
    require_positives(count, max_positives)
    found, places = _room(count, len(levels.strides))
    library.lossd_positives(reference, ctypes.byref(places))
    return found


def _image(objects: Objects) -> _Image:
    """Returns the objects of an image in the painter's terms; it points into their arrays."""
    boxes, crowd = objects.boxes, objects.iscrowd
    return _Image(
        address_of(boxes),
        address_of(objects.labels),
        None if crowd is None else address_of(crowd),
        len(boxes),
        boxes.dtype == np.float32,
    )


def _room(count: int, levels: int) -> tuple[Positives, _Positives]:
    """Returns arrays for so many positives, their elements not set, and where they lie: all in one piece."""
    counts = 8 * count
    cells = counts + 8 * levels
    matched = cells + 16 * count
    ltrb = matched + 4 * count
    centerness = ltrb + 16 * count
    memory = np.empty(centerness + 4 * count, np.uint8)
    at = address_of(memory)
    found = Positives(
        labels=np.ndarray((count,), _INT64, memory),
        cells=np.ndarray((count, 4), _INT32, memory, cells),
        matched=np.ndarray((count,), _INT32, memory, matched),
        ltrb=np.ndarray((count, 4), _FLOAT32, memory, ltrb),
        centerness=np.ndarray((count,), _FLOAT32, memory, centerness),
        level_counts=np.ndarray((levels,), _INT64, memory, counts),
    )
    places = _Positives(at, at + cells, at + matched, at + ltrb, at + centerness, at + counts)
    return found, places


@lru_cache(maxsize=256)
def _level_addresses(levels: Pyramid) -> tuple[int, ...]:
    """Returns where the arrays of a pyramid lie, which is to be held as long as that is of use."""
    return tuple(map(address_of, (levels.strides, levels.heights, levels.widths, levels.starts)))


@lru_cache(maxsize=256)
def _ends(ranges: Ranges) -> NDArray[np.float64]:
    """Returns the ends of ranges, lower ones first: as they are, and rounded to float32; `[2, 2, levels]`."""
    wide = np.array(ranges, np.float64).T
    with np.errstate(over="ignore"):  # a range may end beyond float32, and is then endless
        return np.ascontiguousarray([wide, wide.astype(np.float32)], np.float64)
