"""A job cut into steps: what is evaluated without a look at who else waits."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lossd.gpu_memory import GpuArray
from lossd_server.engine.batching import Batching
from lossd_server.engine.work import LossItem

_ARRAYS = (np.ndarray, GpuArray)

_ITEM_COST = 1 << 19
"""What an item costs beside its bytes: as many as are read and written while the smallest is evaluated."""


class Step(NamedTuple):
    """Some items of a job.

    Attributes:
        items: The items.
        size: Bytes that they read and write.
    """

    items: Sequence[LossItem]
    size: int

    @property
    def cost(self) -> int:
        """What the step takes of the device, in bytes."""
        return self.size + len(self.items) * _ITEM_COST


def steps_of(items: Sequence[LossItem], limits: Batching) -> list[Step]:
    """Cuts the items of a job into steps within the limits."""
    steps, begun, size = [], 0, 0
    for index, item in enumerate(items):
        more = bytes_of(item)
        if index > begun and (index - begun >= limits.max_items or size + more > limits.max_bytes):
            steps.append(Step(items=items[begun:index], size=size))
            begun, size = index, 0
        size += more
    steps.append(Step(items=items[begun:], size=size))
    return steps


def bytes_of(item: LossItem) -> int:
    """Returns the bytes of an item's tensors and of the gradients that are asked for."""
    return _bytes_in(item.arguments.values()) + _bytes_in(map(item.arguments.get, item.options.gradients))


def _bytes_in(values: Iterable[Any]) -> int:
    size = 0
    for value in values:
        for array in value if isinstance(value, list) else (value,):
            if isinstance(array, _ARRAYS):
                size += array.nbytes
    return size
