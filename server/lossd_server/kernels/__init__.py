"""Kernels in C for the CPU: compiled when first wanted, kept on disk, and done without where they cannot be.

Each has a caller in Python on the floor that it serves: `losses.native`, `targets.native`.
"""

from lossd_server.kernels.library import load_library, loaded_library

__all__ = ["load_library", "loaded_library"]
