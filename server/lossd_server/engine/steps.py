"""A job cut into steps: what is evaluated without a look at who else waits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lossd.gpu_memory import GpuArray
from lossd_server.engine.batching import Batching
from lossd_server.engine.work import LossItem
from lossd_server.losses.arrays import NARROW_FLOATS, PLAIN_GRADIENTS

_ARRAYS = (np.ndarray, GpuArray)

_INTEGERS = {np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NARROW = NARROW_FLOATS | _INTEGERS | {np.dtype(np.bool_)}

_ITEM_COST = 1 << 19
"""What an item costs beside its bytes: as many as are read and written while the smallest is evaluated."""


class Step(NamedTuple):
    """Some items of a job, and how many bytes they read and write."""

    items: Sequence[LossItem]
    size: int

    @property
    def cost(self) -> int:
        """What the step takes of the device, in bytes."""
        return self.size + len(self.items) * _ITEM_COST


class Load(NamedTuple):
    """What a job asks of the device: as much as any of that loss and options, with arrays like these.

    Attributes:
        steps: How many items each step has, and how many bytes they read and write.
        is_narrow: Whether no float among the tensors and gradients of its items is of more than 32 bits.
    """

    steps: Sequence[tuple[int, int]]
    is_narrow: bool

    @classmethod
    def of(cls, items: Sequence[LossItem], limits: Batching) -> "Load":
        """Returns the load of items, in steps within the limits."""
        steps, count, size, is_narrow = [], 0, 0, True
        for item in items:
            more, is_item_narrow = _look_at(item)
            is_narrow = is_narrow and is_item_narrow
            if count and (count >= limits.max_items or size + more > limits.max_bytes):
                steps.append((count, size))
                count, size = 0, 0
            count, size = count + 1, size + more
        return cls([*steps, (count, size)], is_narrow)

    def cut(self, items: Sequence[LossItem]) -> list[Step]:
        """Returns the steps of items whose load this is."""
        steps, begin = [], 0
        for count, size in self.steps:
            steps.append(Step(items[begin : begin + count], size))
            begin += count
        return steps


def _look_at(item: LossItem) -> tuple[int, bool]:
    """Returns how many bytes an item reads and writes, and whether it is narrow, as in `Load`."""
    gradients = item.options.gradients
    size, is_narrow = 0, item.options.gradient_dtype in PLAIN_GRADIENTS
    for name, value in item.arguments.items():
        times = 2 if name in gradients else 1
        for array in value if isinstance(value, list) else (value,):
            if isinstance(array, _ARRAYS):
                size += array.nbytes * times
                is_narrow = is_narrow and array.dtype in _NARROW
    return size, is_narrow
