"""Slices of regions as arrays: the ones that a request reads, and the ones its answer is written to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossd.gpu_memory import GpuArray, GpuMemory
from lossd.shared_memory import ALIGNMENT
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.shared_memory.regions import Owner, Regions, unknown_region

Array = NDArray[Any]
AnyArray = Array | GpuArray
"""An array of the host's memory, or of a GPU's."""


class _Interval(NamedTuple):
    """A slice of a region; they are ordered by where they begin."""

    region_id: bytes
    start: int
    stop: int
    path: str
    written: bool


class Slices:
    """The slices that one request names.

    The caller can write to all of them at any time. What is read in place must be harmless whatever it
    holds; anything that is checked is to be read as a copy.

    Args:
        regions: Where to find them; None for a caller who can have passed none.
    """

    def __init__(self, regions: Regions | None) -> None:
        self._regions = regions
        self._used: list[_Interval] = []
        self._named_bytes = 0

    def read(
        self, region_id: bytes, offset: int, dtype: np.dtype[Any], shape: Sequence[int], *, in_place: bool
    ) -> AnyArray:
        """Returns a slice to be read: the very memory, or a copy on the host that nobody else can write to.

        Raises:
            InvalidInputError: There is no such region, or the slice does not lie in it.
        """
        array = self._array(region_id, offset, dtype, shape)
        self._use(region_id, offset, array, "", written=False)
        if isinstance(array, GpuArray):
            if in_place:
                return array
            array = array.numpy()
        elif not in_place:
            array = array.copy()
        array.flags.writeable = False
        return array

    def write(
        self, path: str, region_id: bytes, offset: int, dtype: np.dtype[Any], shape: Sequence[int]
    ) -> AnyArray:
        """Returns a slice to be written to; `path` is where the request names it, for errors.

        Raises:
            InvalidInputError: There is no such region, or the slice does not lie in it.
        """
        array = self._array(region_id, offset, dtype, shape)
        self._use(region_id, offset, array, path, written=True)
        return array

    def owner(self) -> Owner | None:
        """Returns whose the memory is that is written to, else that is read; None where none is named."""
        written = next((used for used in self._used if used.written), None)
        first = written or next(iter(self._used), None)
        return None if first is None or self._regions is None else self._regions.owner_of(first.region_id)

    def check_overlaps(self) -> None:
        """Raises `INVALID_SLICE` where a slice that is written to overlaps any other."""
        reach: dict[bytes, tuple[int, int]] = {}
        for used in sorted(self._used):
            any_stop, written_stop = reach.get(used.region_id, (0, 0))
            if used.start < (any_stop if used.written else written_stop):
                raise self._overlap(used)
            reach[used.region_id] = (
                max(any_stop, used.stop),
                max(written_stop, used.stop) if used.written else written_stop,
            )

    def _array(self, region_id: bytes, offset: int, dtype: np.dtype[Any], shape: Sequence[int]) -> AnyArray:
        if self._regions is None:
            raise unknown_region()
        mapping = self._regions.find(region_id)
        length, size = math.prod(shape) * dtype.itemsize, len(mapping)
        if offset < 0 or offset % ALIGNMENT or offset + length > size:
            raise InvalidInputError(
                Reason.INVALID_SLICE,
                f"{length} bytes at {offset} of a region of {size}: want them inside, "
                f"at a multiple of {ALIGNMENT}",
                field="shared",
                offset=offset,
                length=length,
                size=size,
                alignment=ALIGNMENT,
            )
        self._named_bytes += length
        if self._named_bytes > self._regions.max_bytes:
            raise InvalidInputError(
                Reason.MESSAGE_TOO_LARGE,
                f"with this the slices of the request come to {self._named_bytes} bytes, "
                f"want at most {self._regions.max_bytes}",
                field="shared",
                value=self._named_bytes,
                limit=self._regions.max_bytes,
            )
        if isinstance(mapping, GpuMemory):
            return GpuArray(mapping, offset, shape, dtype)
        return np.ndarray(shape, dtype, buffer=mapping, offset=offset)

    def _use(self, region_id: bytes, offset: int, array: AnyArray, path: str, *, written: bool) -> None:
        if array.nbytes:
            self._used.append(
                _Interval(
                    region_id=region_id, start=offset, stop=offset + array.nbytes, path=path, written=written
                )
            )

    def _overlap(self, used: _Interval) -> InvalidInputError:
        """Returns the refusal of an overlap, by the path of the slice that is written to."""
        path = used.path or next(
            other.path
            for other in self._used
            if other.written
            and other.region_id == used.region_id
            and other.start < used.stop
            and used.start < other.stop
        )
        return InvalidInputError(Reason.INVALID_SLICE, "overlaps another slice of the request", field=path)
