"""Which work may run on any thread.

Torch keeps a team of helpers for every thread that ever called one of its parallel operations. Work
that does without them runs on the thread that brings it, and saves two changes of threads, which take
longer than a small evaluation.
"""

import numpy as np
import torch

from lossd_server.engine.work import LossItem, LossJob
from lossd_server.kernels import loaded_library
from lossd_server.losses import LossModule

_WIDE = {None, torch.float32}
_FLOAT32 = np.dtype(np.float32)


def leaves_torch_asleep(job: LossJob) -> bool:
    """Whether the compiled kernels do all of a job on the host."""
    return (
        loaded_library() is not None
        and isinstance(job.loss, LossModule)
        and job.loss.has_kernels
        and all(map(_is_of_float32, job.items))
    )


def _is_of_float32(item: LossItem) -> bool:
    if item.options.gradient_dtype not in _WIDE:
        return False
    for value in item.arguments.values():
        for array in value if isinstance(value, list) else (value,):
            if isinstance(array, np.ndarray) and array.dtype.kind not in "iub" and array.dtype != _FLOAT32:
                return False
    return True
