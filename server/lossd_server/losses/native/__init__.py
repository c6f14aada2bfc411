"""The compiled kernels of the losses, called with tensors or arrays."""

from lossd_server.losses.native.focal import LABEL_TYPES, focal_sum_of_arrays, focal_sums_natively
from lossd_server.losses.native.labels import count_objects_natively
from lossd_server.losses.native.rows import row_sums_natively

__all__ = [
    "LABEL_TYPES",
    "count_objects_natively",
    "focal_sum_of_arrays",
    "focal_sums_natively",
    "row_sums_natively",
]
