"""Starts that fail: one line that says why, and an exit code that is not 0."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from tests.whole.conftest import run, serving

BAD_SETTINGS = {
    "streams beyond all threads": ("--max-streams 5000", "max_streams: is 5000, want at most 4096"),
    "no place at all": ("--max-in-flight 0", "max_in_flight: is 0, want at least 1"),
    "more places than threads": ("--max-in-flight 5000", "max_in_flight: is 5000, want at most 4096"),
    "less room than one message takes": (
        "--max-in-flight-bytes 1000",
        "max_in_flight_bytes: is 1000, want at least 268435456",
    ),
    "no time to read": ("--read-seconds 0", "read_seconds: is 0.0, want at least 0.01"),
    "time to read without end": ("--read-seconds 1e9", "read_seconds: is 1000000000.0, want at most 86400"),
    "shared memory below nothing": ("--max-shared-bytes -1", "max_shared_bytes: is -1, want at least 0"),
    "less shared memory in all": ("--max-total-shared-bytes 5", "max_total_shared_bytes: is 5"),
    "message limit of nothing": ("--max-message-bytes 10", "max_message_bytes: is 10"),
    "drain before now": ("--drain-seconds -1", "drain_seconds: is -1.0, want at least 0"),
    "drain without end": ("--drain-seconds inf", "drain_seconds: is inf, want finite"),
    "age below nothing": ("--max-connection-age-seconds -1", "max_connection_age_seconds: is -1.0"),
    "port that is none": ("--listen 127.0.0.1:999999", "listen: is '127.0.0.1:999999'"),
    "address without a port": ("--listen localhost", "listen: is 'localhost'"),
    "socket without a path": ("--listen unix:", "listen: is 'unix:', want host:port"),
    "metrics port that is none": ("--metrics-port 70000", "metrics_port: is 70000, want at most 65535"),
    "mode that is none": ("--unix-mode 7777", "unix_mode: is 0o7777, want 0..0o777"),
    "certificate without a key": ("--tls-cert a.pem", "tls_key: is not set, but tls_cert is"),
    "callers' authority without TLS": ("--tls-client-ca a.pem", "tls_cert: is not set, but tls_client_ca is"),
}
BAD_OPTIONS = {
    "option that there is none of": ("--port 1", "No such option '--port'"),
    "number that is none": ("--max-streams many", "'many' is not a valid integer"),
    "mode that is no number": ("--unix-mode rw", "'rw' is no octal number such as 0660"),
    "settings file that is not there": ("--config nowhere.toml", "'nowhere.toml' does not exist"),
}
BAD_FILES = {
    "unknown_setting = 1": "unknown settings: unknown_setting",
    "not toml": "Expected '='",
    'max_streams = "many"': "'many' is not a valid integer",
    "max_streams = 5000": "max_streams: is 5000, want at most 4096",
}
BAD_PLACES = {
    "device that is not here": ("--device tpu", "device: is 'tpu'"),
    "module that does not import": ("--load no_such_module:Loss", "cannot load no_such_module:Loss"),
    "module that is no loss": ("--load json:JSONDecoder", "is no torch.nn.Module"),
    "module without a class": ("--load json", "want package.module:Class"),
    "address of another machine": (
        "--insecure --listen 192.0.2.1:0",
        "cannot listen on 192.0.2.1:0: Cannot assign requested address",
    ),
    "plain text to everybody": ("--listen 0.0.0.0:0", "more than this machine"),
    "socket in no directory": ("--listen unix:/nowhere/lossd.sock", "lossd.sock: No such file or directory"),
    "certificate that is not there": (
        "--tls-cert nowhere.pem --tls-key nowhere.key",
        "tls_cert: cannot read nowhere.pem: No such file or directory",
    ),
}


@pytest.fixture(scope="module")
def start():
    """A function that returns the one line of a start that fails, and its exit code."""
    command = [sys.executable, "-m", "tests.whole.starter"]
    # As `lossd serve` sets it, before gRPC is imported.
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as starter:

        def fails(*options):
            starter.stdin.write(json.dumps(["serve", "--metrics-port", "-1", *options]) + "\n")
            starter.stdin.flush()
            code, said = json.loads(starter.stdout.readline())
            (line,) = said.splitlines()
            assert line.startswith("lossd: ")
            return line, code

        yield fails
        starter.stdin.close()


@pytest.mark.parametrize("case", [*BAD_SETTINGS, *BAD_PLACES])
def test_settings_that_cannot_be_served(start, case):
    options, message = {**BAD_SETTINGS, **BAD_PLACES}[case]
    line, code = start(*options.split())
    assert (message in line, code) == (True, 1), line


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_there_are_none_of(start, case):
    options, message = BAD_OPTIONS[case]
    line, code = start(*options.split())
    assert (message in line, code) == (True, 2), line


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_settings_file(start, tmp_path, text):
    settings = tmp_path / "lossd.toml"
    settings.write_text(text)
    line, code = start("--config", str(settings))
    assert BAD_FILES[text] in line
    assert code in {1, 2}


@pytest.mark.parametrize("statement", ["raise ValueError('one line\\nand another')", "raise SystemExit(0)"])
def test_a_module_that_fails_or_exits_when_it_is_imported(tmp_path, statement):
    (tmp_path / "failing.py").write_text(statement)
    done = run("serve", "--metrics-port", "-1", "--load", "failing:Loss", PYTHONPATH=with_path(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("lossd: load: cannot load failing:Loss: ")


def with_path(directory):
    return os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])


def test_a_taken_port(start, address):
    assert start("--listen", address) == (
        f"lossd: listen: cannot listen on {address}: Address already in use",
        1,
    )


def test_a_taken_metrics_port(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line, code = start("--listen", "127.0.0.1:0", "--metrics-port", str(port))
    assert (f"metrics_port: cannot listen on 127.0.0.1:{port}: Address already in use" in line, code) == (
        True,
        1,
    )


def test_the_command_itself_says_no_more_either():
    done = run("serve", "--device", "tpu")
    assert (done.returncode, done.stderr) == (1, "lossd: device: is 'tpu', want auto, cpu, cuda or cuda:N\n")
    done = run("serve", "--port", "1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_unix_socket_in_use_is_a_failed_start(tmp_path):
    target = f"unix:{tmp_path / 'lossd.sock'}"
    with serving("--listen", target):
        done = run("serve", "--metrics-port", "-1", "--listen", target)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "a server does" in done.stderr
        assert re.search(r"shared memory +1,073,741,824 bytes", run("info", target).stdout)


def test_a_path_with_no_room_for_the_socket_beside_it_is_a_failed_start(tmp_path):
    path = f"{tmp_path}/".ljust(106, "x")
    done = run("serve", "--metrics-port", "-1", "--listen", f"unix:{path}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"cannot listen on {path}.shm for shared memory" in done.stderr
    with serving("--max-shared-bytes", "0", "--listen", f"unix:{path}"):
        assert "none here" in run("info", f"unix:{path}").stdout
