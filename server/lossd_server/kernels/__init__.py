"""Kernels in C for the CPU: compiled when first wanted, kept on disk, and done without where they cannot be.

Each has a caller in Python on the floor that it serves: `losses.native`, `targets.native_painting` and
`targets.native_reading`.
"""

from lossd_server.kernels.arrays import address_of
from lossd_server.kernels.library import load_library, loaded_library

__all__ = ["address_of", "load_library", "loaded_library"]
