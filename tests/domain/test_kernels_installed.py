"""Kernels that were compiled ahead of time: found by the dynamic loader, the best one for the processor."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lossd_server.kernels.compiler import compile_for_levels, installed_name

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")

LOAD = """
from lossd_server.kernels import load_library
assert load_library()
print(next(line.split()[-1] for line in open("/proc/self/maps") if "kernels-" in line))
"""
COMPUTE = """
import torch
from lossd_server.losses import FocalLoss
logits = torch.randn(4, 80, 13, 17, generator=torch.Generator().manual_seed(1)).requires_grad_()
loss = FocalLoss()(logits, torch.arange(4 * 13 * 17).reshape(4, 13, 17) % 81 - 1)
loss.backward()
print(float(loss).hex(), hash(bytes(logits.grad.numpy().data)))
"""


def run(program, **environment):
    """Runs a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "0", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("installed")
    compile_for_levels(directory)
    return directory


def level_of(installed, **environment):
    """Returns the directory that the kernels of a process came from, relative to where they are installed."""
    done = run(LOAD, LD_LIBRARY_PATH=str(installed), PATH="/nowhere", CC="", **environment)
    return str(Path(done.stdout.strip()).relative_to(installed).parent), done.stderr


@x86_64
@pytest.mark.parametrize(
    ("masked", "level"), [("-AVX512F", "glibc-hwcaps/x86-64-v3"), ("", "glibc-hwcaps/x86-64-v4")]
)
def test_the_loader_takes_the_best_that_the_processor_can_run(installed, masked, level):
    if not masked and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("a processor without AVX-512")
    assert level_of(installed, GLIBC_TUNABLES=f"glibc.cpu.hwcaps={masked}") == (level, "")


@x86_64
def test_a_processor_without_fused_operations_does_without_and_says_so(installed, tmp_path):
    done = run(
        COMPUTE,
        LD_LIBRARY_PATH=str(installed),
        GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX2,-AVX512F",
        PATH="/nowhere",
        CC="",
        LOSSD_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 0
    assert done.stderr.count("no compiled kernels, slower ones are used: no C compiler on this machine") == 1


@x86_64
def test_every_level_gives_the_same_bits_as_what_is_compiled_here(installed, tmp_path):
    native = run(COMPUTE, LOSSD_CACHE_DIR=str(tmp_path))
    best = run(COMPUTE, LD_LIBRARY_PATH=str(installed))
    lower = run(COMPUTE, LD_LIBRARY_PATH=str(installed), GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX512F")
    assert native.stdout == best.stdout == lower.stdout != ""


def test_nothing_is_written_where_kernels_are_installed(installed, tmp_path):
    assert run(LOAD, LD_LIBRARY_PATH=str(installed), LOSSD_CACHE_DIR=str(tmp_path)).returncode == 0
    assert not list(tmp_path.iterdir())


def test_kernels_of_another_source_are_not_found(installed, tmp_path):
    other = tmp_path / installed_name().replace("kernels-", "kernels-0")
    other.write_bytes(next(installed.rglob("*.so")).read_bytes())
    done = run(LOAD, LD_LIBRARY_PATH=str(tmp_path), PATH="/nowhere", CC="", LOSSD_CACHE_DIR=str(tmp_path))
    assert "no compiled kernels" in done.stderr


def compile_ahead(*arguments, **environment):
    """Runs the command."""
    return subprocess.run(
        [sys.executable, "-m", "lossd_server.kernels", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command_says_what_it_made_and_anyone_can_read_it(tmp_path):
    made = compile_ahead(tmp_path).stdout.split()
    assert made
    for path in map(Path, made):
        assert path.name == installed_name()
        assert path.stat().st_mode & 0o444 == 0o444


def test_the_command_says_what_is_wrong(tmp_path):
    done = compile_ahead(tmp_path, PATH="/nowhere", CC="")
    assert (done.returncode, done.stderr) == (1, "lossd: no C compiler on this machine\n")
    done = compile_ahead("/proc/nowhere")
    assert done.returncode == 1
    assert "/proc/nowhere" in done.stderr
    assert compile_ahead().stderr == "usage: python -m lossd_server.kernels DIRECTORY\n"


def test_nowhere_to_write_is_a_warning_and_no_more():
    program = "import tempfile, os; tempfile.tempdir = '/nowhere'; os.environ.pop('HOME', 0)\n" + COMPUTE
    done = run(program, LOSSD_CACHE_DIR="/proc/nowhere")
    assert done.returncode == 0
    assert done.stderr.count("no compiled kernels") == 1


def test_compiling_takes_python_and_a_compiler_alone(tmp_path):
    program = """
import runpy, sys
for name in ("numpy", "torch", "google", "grpc"):
    sys.modules[name] = None
runpy.run_module("lossd_server.kernels", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob(installed_name()))
