"""`python -m lossd_server.kernels DIRECTORY` compiles kernels ahead of time, for machines without a compiler.

DIRECTORY is one of the dynamic loader's, such as `/usr/local/lib`, followed by `ldconfig`.
"""

import subprocess
import sys
from pathlib import Path

from lossd_server.kernels.compiler import compile_for_levels


def main() -> None:
    """Compiles, and prints what was made; exits with 1, and why, where that fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lossd_server.kernels DIRECTORY")
    try:
        made = compile_for_levels(Path(sys.argv[1]))
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"lossd: {getattr(error, 'stderr', None) or error}")
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
