"""Prints what an image is made of, by size.

`docker run --rm -i --entrypoint python lossd - <deploy/contents.py`
"""

import os
import subprocess
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

MEGABYTE = 1e6
LEAST = 2.0
"""Megabytes below which packages are counted together."""


def main() -> None:
    """Prints the packages of Python and of Debian, and all files together."""
    show("Python packages", ((d.name, size_of(d)) for d in distributions()))
    show("Debian packages", debian_packages())
    print(f"{size_of_tree('/'):8.1f}  all files, in MB")


def show(title: str, packages: Iterable[tuple[str, float]]) -> None:
    """Prints packages, the largest first."""
    known = sorted(packages, key=lambda package: -package[1])
    large = [package for package in known if package[1] >= LEAST]
    print(f"{sum(size for _, size in known):8.1f}  {title}")
    for name, size in large:
        print(f"{size:12.1f}  {name}")
    print(f"{sum(size for _, size in known[len(large) :]):12.1f}  {len(known) - len(large)} smaller ones")


def size_of(package: Distribution) -> float:
    """Returns the size of a package's files that are there, compiled ones included."""
    paths = (Path(str(package.locate_file(file))) for file in package.files or ())
    return sum(path.lstat().st_size for path in paths if path.exists()) / MEGABYTE


def debian_packages() -> Iterable[tuple[str, float]]:
    """Yields Debian's packages, as they say themselves."""
    query = ["/usr/bin/dpkg-query", "-W", "-f", "${Package} ${Installed-Size}\n"]
    listed = subprocess.check_output(query, text=True)  # noqa: S603
    for line in listed.splitlines():
        name, kibibytes = line.split()
        yield name, int(kibibytes) * 1024 / MEGABYTE


def size_of_tree(top: str) -> float:
    """Returns the size of all files of the image's own file system."""
    device = os.lstat(top).st_dev
    seen, size = set(), 0
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if os.lstat(f"{folder}/{name}").st_dev == device]
        for name in files:
            status = os.lstat(f"{folder}/{name}")
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                size += status.st_size
    return size / MEGABYTE


main()
