"""Labels counted by the compiled kernels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossd_server.kernels import address_of, loaded_library

_TYPES = {np.dtype(name): i for i, name in enumerate(("i1", "u1", "i2", "u2", "i4", "i8"))}
"""Types of labels that are counted, by their numbers in focal.c."""


def count_objects_natively(labels: NDArray[Any], num_classes: int) -> int | None:
    """Returns how many labels are of an object, in one pass.

    None where that does not apply, and where a label is neither -1 nor a class.
    """
    library, kind = loaded_library(), _TYPES.get(labels.dtype)
    if library is None or kind is None or not labels.flags.c_contiguous:
        return None
    found: int = library.lossd_count_objects(address_of(labels), kind, labels.size, num_classes)
    return None if found < 0 else found
