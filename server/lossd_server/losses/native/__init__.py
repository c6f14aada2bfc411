"""Compiled kernels for the CPU, and what to do without a compiler."""

from lossd_server.losses.native.focal import focal_sums_natively
from lossd_server.losses.native.library import load_library
from lossd_server.losses.native.rows import row_sums_natively

__all__ = ["focal_sums_natively", "load_library", "row_sums_natively"]
