"""The commands of deploy/README.md for Kubernetes, run as far as they go without a cluster."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.certificates import Authority
from tests.deploy.tools import ROOT

TAKES_A_CLUSTER = ("kubectl rollout", "helm test")
HELM_ALONE = {"--install", "--create-namespace", "--reset-then-reuse-values"}
"""What only a cluster has an answer to."""


def commands():
    """Returns the commands of the section on Kubernetes."""
    text = (ROOT / "deploy" / "README.md").read_text()
    section = text.partition("\n## Kubernetes\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line for line in lines if not line.startswith(TAKES_A_CLUSTER)]


@pytest.fixture
def files(tmp_path):
    """A folder with the files that the commands name, and the repository's beside them."""
    pair = Authority(tmp_path, "authority").issue("lossd.vision.svc")
    for name, path in {"tls.crt": pair.cert, "tls.key": pair.key}.items():
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    (tmp_path / "tokens.toml").write_text('[trainer]\ntoken = "correct-horse-battery"\n')
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    return tmp_path


def without_a_cluster(command):
    """Returns the arguments of a command that does all but tell a cluster."""
    program, *arguments = shlex.split(command)
    if arguments[0] == "upgrade":
        return program, "template", *(a for a in arguments[1:] if a not in HELM_ALONE)
    if arguments[0] == "apply":
        return program, "kustomize", arguments[arguments.index("-k") + 1]
    return program, *arguments, "--dry-run=client", "--output=yaml"


@pytest.mark.parametrize("command", commands())
def test_a_command_makes_objects(tools, files, command):
    program, *arguments = without_a_cluster(command)
    done = tools.run(program, *arguments, directory=files)
    assert done.returncode == 0, done.stderr
    assert all("kind" in found for found in yaml.safe_load_all(done.stdout) if found)


def test_secrets_have_what_the_chart_mounts(tools, files, rendered):
    made = {}
    for command in commands():
        if "create secret" in command:
            done = tools.run(*without_a_cluster(command), directory=files)
            secret = yaml.safe_load(done.stdout)
            made[secret["metadata"]["name"]] = secret["data"].keys()
    assert made["lossd-tls"] >= {"tls.crt", "tls.key"}
    assert made["lossd-tokens"] == {"tokens.toml"}
