"""Which work may run on any thread.

Torch keeps a team of helpers for every thread that ever called one of its parallel operations. Work
that does without them runs on the thread that brings it, and saves two changes of threads, which take
longer than a small evaluation.
"""

from lossd_server.engine.steps import Load
from lossd_server.engine.work import Evaluable
from lossd_server.kernels import loaded_library
from lossd_server.losses import LossModule

HERE, ELSEWHERE = "here", "elsewhere"
"""Kinds of tasks: those that any thread may do, and those that torch's thread does."""


def leaves_torch_asleep(loss: Evaluable, load: Load) -> bool:
    """Whether the compiled kernels do all of a job on the host, and numpy what they leave."""
    return (
        loaded_library() is not None and isinstance(loss, LossModule) and loss.has_kernels and load.is_narrow
    )
