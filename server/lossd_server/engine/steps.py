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
    """Some items of a job.

    Attributes:
        items: The items.
        size: Bytes that they read and write.
        is_narrow: Whether no float among their tensors and gradients is of more than 32 bits.
    """

    items: Sequence[LossItem]
    size: int
    is_narrow: bool

    @property
    def cost(self) -> int:
        """What the step takes of the device, in bytes."""
        return self.size + len(self.items) * _ITEM_COST


def steps_of(items: Sequence[LossItem], limits: Batching) -> list[Step]:
    """Cuts the items of a job into steps within the limits."""
    steps, begun, size, is_narrow = [], 0, 0, True
    for index, item in enumerate(items):
        more, is_more_narrow = _look_at(item)
        if index > begun and (index - begun >= limits.max_items or size + more > limits.max_bytes):
            steps.append(Step(items[begun:index], size, is_narrow))
            begun, size, is_narrow = index, 0, True
        size += more
        is_narrow = is_narrow and is_more_narrow
    steps.append(Step(items[begun:], size, is_narrow))
    return steps


def _look_at(item: LossItem) -> tuple[int, bool]:
    """Returns what a `Step` says of the tensors of an item and of the gradients that are asked for."""
    gradients = item.options.gradients
    size, is_narrow = 0, item.options.gradient_dtype in PLAIN_GRADIENTS
    for name, value in item.arguments.items():
        times = 2 if name in gradients else 1
        for array in value if isinstance(value, list) else (value,):
            if isinstance(array, _ARRAYS):
                size += array.nbytes * times
                is_narrow = is_narrow and array.dtype in _NARROW
    return size, is_narrow
