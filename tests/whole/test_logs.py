"""What `lossd serve` writes to standard error, whoever in the process says it."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lossd_client import Client, CustomLoss, InvalidInputError, ServerError
from tests.whole.conftest import LOSSD, serving

HERE = Path(__file__).parent
SAID = {"from a warning", "from a library", "from a thread", "from a destructor", "from\na loss"}


def lines_of_a_noisy_server(log_format, *calls):
    options = ("--load", "noisy:Noisy", "--log-format", log_format)
    with serving(*options, directory=HERE) as (process, address, first), Client(address) as client:
        for call in calls:
            call(client)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    return [first.rstrip("\n"), *rest.splitlines()]


def make_noise(client):
    with pytest.raises(ServerError):
        client.compute_loss(CustomLoss("Noisy"), {"pred": np.ones(3, np.float32)})


def ask_for(name):
    def ask(client):
        with pytest.raises(InvalidInputError):
            client.compute_loss(CustomLoss("Noisy"), {name: np.ones(3, np.float32)})

    return ask


def test_as_json_every_line_is_an_object_whoever_says_it():
    lines = list(map(json.loads, lines_of_a_noisy_server("json", make_noise, ask_for("other"))))
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    by_event = {line["event"]: line for line in lines}
    assert by_event["from a warning"]["category"] == "UserWarning"
    assert by_event["from a library"]["logger"] == "a.library"
    assert "RuntimeError: from\na loss" in by_event["custom loss failed"]["exception"]
    uncaught = [line for line in lines if line["event"] == "uncaught exception"]
    assert [line.get("thread") for line in uncaught] == ["failing", None]
    assert "from a thread" in uncaught[0]["exception"]
    assert "from a destructor" in uncaught[1]["exception"]
    assert [line["reason"] for line in lines if line["event"] == "refused"] == [
        "CUSTOM_LOSS_FAILED",
        "UNEXPECTED_FIELD",
    ]
    assert lines[-1]["event"] == "stopped"


def test_as_text_a_caller_writes_no_lines_of_its_own():
    name = "x\n2026-01-01T00:00:00Z [info     ] stopped\x1b[31m"
    lines = lines_of_a_noisy_server("text", ask_for(name))
    (refused,) = (line for line in lines if "refused" in line)
    assert repr(name)[1:-1] in refused
    assert sum("stopped" in line for line in lines) == 2
    assert not any(line.startswith("2026-01-01") for line in lines)


def test_as_text_a_traceback_shows_no_variables():
    text = "\n".join(lines_of_a_noisy_server("text", make_noise))
    assert all(said in text for said in SAID)
    assert "tensor(" not in text


@pytest.mark.parametrize(
    ("options", "event"),
    [
        (["--device", "tpu"], "cannot start"),
        (["--load", "no_such_module:Loss"], "cannot start"),
        (["--listen", "nonsense"], "cannot start"),
        (["--load", "noisy:Unforeseen"], "uncaught exception"),
    ],
)
def test_a_start_that_fails_is_one_line_of_json_too(options, event):
    command = [*LOSSD, "serve", "--metrics-port", "-1", "--log-format", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=HERE)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["event"] == event
