"""Labels counted by the compiled kernels."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossd_server.kernels import address_of, loaded_library

_NAMES = ("int8", "uint8", "int16", "uint16", "int32", "int64")

_TYPES = {dtype: i for i, name in enumerate(_NAMES) for dtype in (np.dtype(name), getattr(torch, name))}
"""Types of labels that are counted, by their numbers in focal.c."""


def count_objects_natively(labels: Any, num_classes: int) -> int | None:
    """Returns how many labels, numpy or torch, are of an object, in one pass.

    None where that does not apply, and where a label is neither -1 nor a class.
    """
    library, kind = loaded_library(), _TYPES.get(labels.dtype)
    if library is None or kind is None:
        return None
    if isinstance(labels, Tensor):
        if not (labels.is_cpu and labels.is_contiguous()):
            return None
        address, count = labels.data_ptr(), labels.numel()
    elif labels.flags.c_contiguous and labels.flags.aligned:
        address, count = address_of(labels), labels.size
    else:
        return None
    found: int = library.lossd_count_objects(address, kind, count, num_classes)
    return None if found < 0 else found
