"""Which stretches of a region are free: knows numbers, no memory."""

import bisect

from lossd.shared_memory import ALIGNMENT


class Allocator:
    """Hands out stretches of a region, none of which overlap.

    Args:
        size: Bytes there are.
    """

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []  # (start, stop), ascending, none touching the next
        self._used: dict[int, int] = {}

    @property
    def is_unused(self) -> bool:
        """Whether nothing is handed out."""
        return not self._used

    def allocate(self, length: int) -> int | None:
        """Returns the lowest offset, a multiple of `ALIGNMENT`, with that many free bytes, or None."""
        length = max(-(-length // ALIGNMENT), 1) * ALIGNMENT
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                rest = [(start + length, stop)] if stop - start > length else []
                self._free[index : index + 1] = rest
                self._used[start] = start + length
                return start
        return None

    def free(self, offset: int) -> None:
        """Takes back what began at an offset."""
        start, stop = offset, self._used.pop(offset)
        index = bisect.bisect(self._free, (start, stop))
        last = index
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free[index][0]
        if last < len(self._free) and self._free[last][0] == stop:
            stop = self._free[last][1]
            last += 1
        self._free[index:last] = [(start, stop)]
