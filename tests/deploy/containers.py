"""Images built and containers run in a store of the tests' own, with neither daemon nor registry.

`python -m tests.deploy.containers FOLDER` makes a store with lossd's image for CPUs, called `lossd`; tests
find it by `LOSSD_DEPLOY_STORE=FOLDER`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.tools import ROOT, missing

COMMANDS = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "docker.io/library/debian:bookworm-slim"
UID = 10001

_CLEAN = (
    '--aptopt=Dir::Cache::pkgcache ""',
    '--aptopt=Dir::Cache::srcpkgcache ""',
    # Not an option: mmdebstrap itself needs what it has downloaded.
    """--customize-hook=echo 'APT::Keep-Downloaded-Packages "false";' >"$1"/etc/apt/apt.conf.d/99downloads""",
)
"""What Debian's images tell apt not to keep."""

RESTRICTED = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    f"--user={UID}:{UID}",
)
"""What the chart asks of a cluster, in podman's words; its seccomp profile is podman's own."""

_SLIM = ("doc", "info", "lintian/overrides", "locale", "man")
"""Directories of /usr/share that Debian's slim images leave out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Containers:
    """A store of images and containers.

    Attributes:
        folder: Where it is.
        environment: What makes buildah and podman use it.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command, check=True, timeout=280, stdin=None):
        """Runs buildah or podman and returns what it did."""
        done = subprocess.run(
            [*map(str, command)],
            env=self.environment,
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}"
        return done

    def build(self, name, *options, check=True):
        """Builds the image of deploy/Dockerfile."""
        return self.run(
            *("buildah", "bud", "--isolation=chroot", "--network=host", "--format=docker", "--layers"),
            *(
                "--pull-never",
                f"--build-context=wheels={self.folder / 'wheels'}",
                "--build-arg=PIP_NO_INDEX=1",
            ),
            *("--file=deploy/Dockerfile", f"--tag={name}", *options, "."),
            check=check,
            timeout=1200,
        )

    def inspect(self, name):
        """Returns what podman knows of an image or a container."""
        return json.loads(self.run("podman", "inspect", name).stdout)[0]

    def run_inside(self, image, command, *arguments, user=UID, options=(), stdin=None):
        """Runs one command of an image and returns what it did."""
        return self.run(
            *("podman", "run", "--rm", "--interactive", "--network=none"),
            *("--no-healthcheck", f"--user={user}", f"--entrypoint={command}", *options, image, *arguments),
            stdin=stdin,
        )

    @contextmanager
    def running(self, image, *arguments, options=(), network="host"):
        """Yields a container that runs an image with the chart's own security context, and removes it."""
        done = self.run(
            *("podman", "run", "--detach", f"--network={network}"),
            *(*RESTRICTED, *options, image, *arguments),
        )
        container = Container(store=self, name=done.stdout.strip())
        try:
            yield container
        finally:
            self.run("podman", "rm", "--force", "--time=0", container.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A container.

    Attributes:
        store: Where it is.
        name: Its name.
    """

    store: Containers
    name: str

    def exec(self, *command):
        """Runs a command inside and returns what it did."""
        return self.store.run("podman", "exec", self.name, *command, check=False)

    def signal(self, name):
        """Sends a signal to its process 1."""
        self.store.run("podman", "kill", f"--signal={name}", self.name)

    def exit_code(self, within=30):
        """Waits for its end and returns its exit code."""
        return int(self.store.run("podman", "wait", self.name, timeout=within).stdout)

    def log(self):
        """Returns what it wrote."""
        done = self.store.run("podman", "logs", self.name)
        return done.stdout + done.stderr

    def wait_for(self, pattern, within=90):
        """Returns the match of a pattern in its log, once it is there."""
        for _ in range(within * 5):
            if found := re.search(pattern, self.log()):
                return found
            state = self.store.inspect(self.name)["State"]
            assert state["Running"], self.log()
            time.sleep(0.2)
        raise AssertionError(f"no {pattern!r} in {within} s:\n{self.log()}")

    def process_id(self):
        """Returns the id of its process 1, as this machine sees it."""
        return self.store.inspect(self.name)["State"]["Pid"]


def open_store():
    """Returns the store that `LOSSD_DEPLOY_STORE` names."""
    folder = Path(os.environ.get("LOSSD_DEPLOY_STORE", ""))
    if not (folder / "storage.conf").is_file():
        missing(
            "LOSSD_DEPLOY_STORE names no store of images; python -m tests.deploy.containers FOLDER makes one"
        )
    return Containers(folder=folder, environment=_environment(folder))


def make_store(folder):
    """Makes a store, and the image in it; what an earlier run made there is used again."""
    if absent := [command for command in COMMANDS if shutil.which(command) is None]:
        sys.exit(f"not on this machine: apt-get install {' '.join(absent)}")
    if os.geteuid() != 0:
        sys.exit("building an image here takes root")
    if sys.version_info[:2] != (3, 11):
        sys.exit("the image's Python is 3.11, and wheels for it are downloaded by such a one")
    folder.mkdir(parents=True, exist_ok=True)
    store = Containers(folder=folder, environment=_environment(folder))
    _isolate(store)
    _choose_driver(store)
    if store.run("podman", "image", "exists", BASE, check=False).returncode:
        _provide_base(store)
    _provide_wheels(store)
    store.build("lossd")


def _environment(folder):
    files = {"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf"}
    return {**os.environ, **{name: str(folder / file) for name, file in files.items()}}


def _isolate(store):
    """Keeps the store's state apart from that of others on the machine, and within what a sandbox grants."""
    (store.folder / "containers.conf").write_text(
        f"""[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
tmp_dir = "{store.folder}/libpod"
lock_type = "file"
"""
    )


def _choose_driver(store):
    """Layers on one another where the kernel allows it, else copies of everything for each."""
    folder = store.folder
    for driver in ("overlay", "vfs"):
        settings = {"driver": driver, "graphroot": f"{folder}/images", "runroot": f"{folder}/run"}
        lines = [f'{name} = "{value}"' for name, value in settings.items()]
        (folder / "storage.conf").write_text("\n".join(["[storage]", *lines, ""]))
        if store.run("podman", "info", check=driver == "vfs").returncode == 0:
            return


def _provide_base(store):
    """Makes what there is no registry to pull from: the base image, of the packages that it is made of."""
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _SLIM]
    archive = store.folder / "base.tar"
    merged = ("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--include=usr-is-merged")
    store.run("mmdebstrap", "--quiet", "--variant=minbase", *merged, *excluded, *_CLEAN, "bookworm", archive)
    store.run("podman", "import", "--quiet", archive, BASE)
    archive.unlink()


def _provide_wheels(store):
    """Downloads what the image is made of, for a build that asks no index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--constraint=constraints.txt"]
    store.run(*command, f"--dest={store.folder / 'wheels'}", ".[otel,server]", "hatchling>=1.27")


if __name__ == "__main__":
    make_store(Path(sys.argv[1]).resolve())
