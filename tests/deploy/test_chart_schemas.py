"""The rendered chart against the schemas of Kubernetes and of the custom resources that it makes."""

import pytest

from tests.deploy.conftest import CASES
from tests.deploy.objects import CUSTOM, of_kind
from tests.deploy.tools import CHART

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'lossd[deploy]'")

VERSIONS = ("1.30", "1.37")
"""The oldest that the chart is for, and the newest that there are schemas of."""


def is_custom(found):
    return found["apiVersion"].startswith(CUSTOM)


@pytest.mark.parametrize("case", CASES)
def test_helm_finds_nothing_to_complain_of(tools, case):
    done = tools.run("helm", "lint", "--strict", CHART, "-f", CHART / "ci" / f"{case}-values.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_knows_every_field(rendered, case, version):
    for found in rendered(case):
        if not is_custom(found):
            kubernetes_validate.validate(found, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_noticed(rendered):
    deployment = {**of_kind(rendered("default"), "Deployment")[0], "replicass": 2}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("case", ["hpa", "keda", "sidecar"])
def test_operators_know_every_field_of_their_resources(tools, rendered, case):
    resources = [found for found in rendered(case) if is_custom(found)]
    assert resources
    assert tools.faults_of(resources) == []


def test_a_field_that_an_operator_does_not_know_is_noticed(tools, rendered):
    (monitor,) = of_kind(rendered("keda"), "ServiceMonitor")
    (scaled,) = of_kind(rendered("keda"), "ScaledObject")
    wrong = [
        {**monitor, "spec": {**monitor["spec"], "endpoints": [{"port": "metrics", "intervall": "3s"}]}},
        {**scaled, "spec": {**scaled["spec"], "minReplicaCount": "two"}},
        {**scaled, "kind": "ScaledObjects"},
    ]
    faults = "\n".join(tools.faults_of(wrong))
    assert "'\"intervall\"' does not exist in type 'IEndpoint'" in faults
    assert "minReplicaCount must be integer" in faults
    assert "ScaledObjects: no such kind" in faults
