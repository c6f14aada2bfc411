"""Kernels for NVIDIA GPUs, and what to do without Triton."""

from lossd_server.losses.gpu.focal import focal_sums_on_gpu
from lossd_server.losses.gpu.head import head_sums_on_gpu
from lossd_server.losses.gpu.library import load_kernels, load_programs, loaded_programs
from lossd_server.losses.gpu.rows import row_sums_on_gpu
from lossd_server.losses.gpu.warm_up import compile_programs

__all__ = [
    "compile_programs",
    "focal_sums_on_gpu",
    "head_sums_on_gpu",
    "load_kernels",
    "load_programs",
    "loaded_programs",
    "row_sums_on_gpu",
]
