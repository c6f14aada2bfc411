"""The image for GPUs, with torch for CPUs in place of the one with CUDA's libraries."""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.deploy.containers import RESTRICTED, UID
from tests.deploy.tools import missing

pytestmark = pytest.mark.timeout(900)

COMPILE = """
import subprocess
from pathlib import Path

import triton.backends.nvidia.driver as nvidia
from triton.runtime.build import _build

cache = Path("/var/cache/lossd")
stub = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1"]
subprocess.run([*stub, "-o", cache / "libcuda.so.1"], check=True)
source = cache / "driver.c"
source.write_text(Path(nvidia.dirname, "driver.c").read_text())
print(_build("launcher", str(source), str(cache), [str(cache)], nvidia.include_dirs, nvidia.libraries, []))
"""


@pytest.fixture(scope="module")
def image(containers):
    containers.build("lossd:cuda", "--build-arg=DEVICE=cuda")
    return "lossd:cuda"


def test_tritons_launcher_can_be_compiled_by_the_user_that_serves(containers, image, tmp_path):
    """What a GPU's driver would bring, libcuda, is a stub here."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        missing("pip install -c constraints.txt triton")
    tmp_path.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, UID, UID)
    package = Path(triton.origin).parent
    done = containers.run_inside(
        image,
        "python",
        "-",
        options=(
            *RESTRICTED,
            f"--volume={cache}:/var/cache/lossd",
            f"--volume={package}:/opt/lossd/lib/python3.11/site-packages/triton:ro",
            "--tmpfs=/tmp",
        ),
        stdin=COMPILE,
    )
    assert "/var/cache/lossd/launcher" in done.stdout


def test_it_serves_on_cpus_too(containers, image):
    arguments = ("serve", "--listen=127.0.0.1:0", "--metrics-port=-1")
    with containers.running(image, *arguments) as container:
        assert "device='cpu" in container.wait_for("serving.*")[0]


def test_the_toolkit_is_asked_for_all_gpus(containers, image):
    environment = containers.inspect(image)["Config"]["Env"]
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(environment)
