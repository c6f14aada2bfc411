"""What runs on the GPU, in Triton's language: imported only where Triton is."""

from lossd_server.losses.gpu.programs.focal import focal_program
from lossd_server.losses.gpu.programs.rows import rows_program
from lossd_server.losses.gpu.programs.totals import zero_program
from lossd_server.losses.gpu.programs.words import TYPES

__all__ = ["TYPES", "focal_program", "rows_program", "zero_program"]
