"""The compiled painter, called with numpy arrays."""

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

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


_IMAGE = Struct("3P2q")  # boxes, labels, crowd; count, narrow
"""`image_objects` of paint.c."""

_JOB = Struct(
    "P"  # images
    "4P"  # strides, heights, widths, starts
    "3P"  # wide ends, narrow ends, canvas
    "3q"  # batch, levels, locations
    "2d"  # offset, least extent
    "2i"  # whether the lower and the upper end are included
)
"""`paint_job` of paint.c."""

_PLACES = Struct("6P")  # labels, cells, matched, ltrb, centerness, level counts
"""`positives` of paint.c."""


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
    images = np.frombuffer(b"".join(map(_image, objects)) or b"\0", np.uint8)
    job = _JOB.pack(
        address_of(images),
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
    count = library.lossd_paint(job, MAX_PAIRS)
    if count == _NO_MEMORY:
        raise MemoryError
    if count < 0:
        require_pairs(~count)
    require_positives(count, max_positives)
    found, places = _room(count, len(levels.strides))
    library.lossd_positives(job, places)
    return found


def _image(objects: Objects) -> bytes:
    """Returns the objects of an image in the painter's terms; it points into their arrays."""
    boxes, crowd = objects.boxes, objects.iscrowd
    return _IMAGE.pack(
        address_of(boxes),
        address_of(objects.labels),
        0 if crowd is None else address_of(crowd),
        len(boxes),
        boxes.dtype == _FLOAT32,
    )


def _room(count: int, levels: int) -> tuple[Positives, bytes]:
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
    places = _PLACES.pack(at, at + cells, at + matched, at + ltrb, at + centerness, at + counts)
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
