"""Which work may run on any thread.

Torch keeps a team of helpers for every thread that ever called one of its parallel operations. Work
that does without them runs on the thread that brings it, and saves two changes of threads, which take
longer than a small evaluation.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lossd_server.engine.work import LossItem, LossJob
from lossd_server.kernels import loaded_library
from lossd_server.losses import LossModule

_WIDE = {None, torch.float32}


def leaves_torch_asleep(job: LossJob) -> bool:
    """Whether the compiled kernels do all of a job on the host."""
    return (
        loaded_library() is not None
        and isinstance(job.loss, LossModule)
        and job.loss.has_kernels
        and all(map(_is_of_float32, job.items))
    )


def _is_of_float32(item: LossItem) -> bool:
    floats = (array.dtype for array in _arrays(item.arguments.values()) if array.dtype.kind not in "iub")
    return item.options.gradient_dtype in _WIDE and all(dtype == np.float32 for dtype in floats)


def _arrays(values: Iterable[Any]) -> Iterable[np.ndarray[Any, Any]]:
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list):
            yield from _arrays(value)
