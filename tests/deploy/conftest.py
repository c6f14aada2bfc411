"""Tests of what an operator deploys. `.ci/deploy` installs what they need; without it they are skipped."""

import pytest
import yaml

from tests.deploy.containers import open_store
from tests.deploy.tools import CHART, install

CASES = tuple(sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir()))
"""Values that are rendered and checked: those of a file in the chart's `ci` each."""


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """Helm, kubectl and the schemas of custom resources."""
    return install(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="session")
def helm_template(tools):
    """A function that renders the chart and returns what helm did."""

    def render(*arguments):
        return tools.run("helm", "template", "loss", CHART, "--namespace", "vision", *arguments)

    return render


@pytest.fixture(scope="session")
def rendered(helm_template):
    """A function that returns the objects of a case."""
    known = {}

    def render(case, *arguments):
        key = (case, arguments)
        if key not in known:
            done = helm_template("-f", CHART / "ci" / f"{case}-values.yaml", *arguments)
            assert done.returncode == 0, done.stderr
            known[key] = [document for document in yaml.safe_load_all(done.stdout) if document]
        return known[key]

    return render


@pytest.fixture(scope="session")
def containers():
    """A store of images in which lossd's, for CPUs, is called `lossd`."""
    return open_store()
