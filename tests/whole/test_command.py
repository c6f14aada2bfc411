"""The command as an operator uses it, the wrong turns included."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole.conftest import LOSSD, run, serving


def test_settings_come_from_option_then_environment_then_file(tmp_path):
    settings = tmp_path / "lossd.toml"
    settings.write_text('max_streams = 3\nmax_in_flight = 20\ndrain_seconds = 1.5\nlog_format = "json"\n')
    environment = {**os.environ, "LOSSD_MAX_IN_FLIGHT": "11", "LOSSD_MAX_STREAMS": "5"}
    with serving("--config", str(settings), "--max-streams", "7", **environment) as (_, address, line):
        assert json.loads(line)["event"] == "serving"
        assert re.search(r"streams at a time +7", run("info", address).stdout)


def test_info_says_what_the_server_offers(address):
    text = run("info", address).stdout
    for name in ("focal", "giou", "centerness", "fcos", "autotimm", "documented"):
        assert name in text


def test_info_without_a_server_says_so():
    done = run("info", "127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
    assert "Traceback" not in done.stderr


def test_health_is_the_exit_code_and_needs_no_torch(address):
    done = run("health", address)
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    program = f"""
import sys
from lossd_server.cli.health import run
try:
    run({address!r}, service='', timeout=5.0, tls=None)
except SystemExit as end:
    print(end.code or 0, "torch" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "SERVING\n0 False\n"


def test_health_of_one_service(address):
    assert run("health", address, "--service", "lossd.v1.LossService").returncode == 0
    done = run("health", address, "--service", "no.such.Service")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "NOT_FOUND" in done.stderr


def test_health_of_a_unix_socket(tmp_path):
    target = f"unix:{tmp_path / 'lossd.sock'}"
    with serving("--listen", target):
        assert run("health", target).returncode == 0
        assert run("health", LOSSD_HEALTH_TARGET=target).stdout == "SERVING\n"


def test_health_of_a_server_that_is_not_there_says_so_in_one_line(tmp_path):
    done = run("health", f"unix:{tmp_path / 'none.sock'}", "--timeout", "2")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "UNAVAILABLE" in done.stderr


def test_health_of_a_server_that_does_not_answer_is_bad_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = run("health", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.5")
    assert done.returncode == 1
    assert "DEADLINE_EXCEEDED" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a process 1 of our own takes root")
def test_sigterm_ends_process_1_before_torch_is_there_too():
    command = ["unshare", "--pid", "--fork", "--kill-child", *LOSSD, "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--metrics-port", "-1"],
        env={**os.environ, "PYTHONVERBOSE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("torch/__init__" in line for line in process.stderr)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "serving" not in rest


def test_a_demo_of_a_file_that_is_no_coco_says_so():
    done = run("demo", "--coco", __file__)
    assert done.returncode == 1
    assert "holds no COCO annotations" in done.stderr


def test_without_torch_the_command_says_what_to_install():
    program = "import sys; sys.modules['torch'] = None; sys.argv = ['lossd', 'demo']\n"
    program += "from lossd_server.cli import main; main()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'lossd[server]'" in done.stderr


def test_a_benchmark_of_real_objects(coco_file):
    done = run("bench", "assign-coco", "--quick", "--coco", str(coco_file))
    assert done.returncode == 0, done.stderr
    assert "real objects, images: 8" in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["assign-coco"], ["assign-coco", "--coco", "README.md"]])
def test_a_benchmark_that_cannot_be_says_so_in_one_line(arguments):
    done = run("bench", "--quick", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("lossd: ")
    assert done.stderr.count("\n") == 1


def test_a_load_is_driven_against_a_server_that_runs(address, tmp_path):
    file = tmp_path / "load.json"
    options = ("--mix", "assign:2,stream-s", "--seconds", "0.5", "--target", address, "--json", str(file))
    done = run("bench", "--load", *options)
    assert done.returncode == 0, done.stderr
    assert [kind["kind"] for kind in json.loads(file.read_text())["phases"][0]["kinds"]] == [
        "assign",
        "stream-s",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "nonsense"], "mix: has 'nonsense', want one of assign"),
        (["--target", "127.0.0.1:1"], "no answer from 127.0.0.1:1"),
        (["--device", "tpu"], "device: is 'tpu'"),
    ],
)
def test_a_load_that_cannot_be_says_so_in_one_line(arguments, message):
    done = run("bench", "--load", "--seconds", "0.5", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("lossd: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_load_takes_no_names_of_cases():
    done = run("bench", "--load", "focal")
    assert done.returncode == 2
    assert "no names of cases: focal" in done.stderr
