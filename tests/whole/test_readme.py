"""What the README says to paste, pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole.conftest import LOSSD

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_example_prints_a_loss_and_the_shape_of_its_gradient(address):
    example = blocks("python")[0].replace("localhost:50051", address)
    loss, shape = output(sys.executable, "-c", example).split(maxsplit=1)
    assert 10 < float(loss) < 40
    assert shape.strip() == "(2, 80, 100, 100)"


def test_the_demo_ends_with_its_tables_and_plain_text():
    text = output(*LOSSD, "demo")
    assert "\x1b" not in text
    losses = [float(value) for value in re.findall(r"^step .*loss ([\d.]+)$", text, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    names = [line.split()[0] for line in text.splitlines()[-18:] if line.strip()]
    for name in (
        "cls_loss",
        "reg_loss",
        "centerness_loss",
        "total_loss",
        "P3",
        "P7",
        "decode",
        "compute",
        "whole",
    ):
        assert name in names


def test_the_demo_takes_a_coco_file(coco_file):
    assert "step  1/1" in output(*LOSSD, "demo", "--coco", str(coco_file), "--steps", "1")


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_pin_what_they_install(block):
    assert "-c constraints.txt" in block
