"""The chart's values: each documented and in the schema, and wrong ones refused by name."""

import importlib.util
import json

import pytest
import yaml

from tests.deploy.tools import CHART, ROOT

WRONG_TURNS = {
    "a value that there is none of": ("replicaCount=3", "additional properties 'replicaCount' not allowed"),
    "a nested one that there is none of": ("tls.enable=true", "additional properties 'enable' not allowed"),
    "a setting that there is none of": ("config.max_message_byte=5", "'/config': additional properties"),
    "a setting that the chart decides": ("config.drain_seconds=5", "'/config': additional properties"),
    "an address that the chart decides": ("config.listen={x:1}", "'/config': additional properties"),
    "a setting of another type": (
        "config.max_streams=many",
        "'/config/max_streams': got string",
    ),
    "half a stream": ("config.max_streams=1.5", "'/config/max_streams'"),
    "a mode that there is none of": ("mode=daemon", "'/mode': value must be one of 'server', 'sidecar'"),
    "replicas below nothing": ("replicas=-1", "'/replicas': minimum: got -1, want 0"),
    "TLS without a certificate": ("tls.enabled=true", "'/tls/secretName': minLength: got 0, want 1"),
    "callers' certificates without TLS": ("tls.clientCertificates=true", "'/tls/clientCertificates'"),
    "a sidecar without a trainer": ("mode=sidecar", "'/trainer/image': minLength: got 0, want 1"),
    "a sidecar with TLS": (
        "mode=sidecar,trainer.image=x,tls.enabled=true,tls.secretName=y",
        "'/tls/enabled': value must be false",
    ),
    "root": ("user=0", "'/user': minimum: got 0, want 1"),
    "a port for root": ("ports.grpc=443", "'/ports/grpc': minimum"),
    "a port that is none": ("ports.metrics=70000", "'/ports/metrics': maximum"),
    "no time for balancers": ("drain.preStopSeconds=0", "'/drain/preStopSeconds': minimum"),
    "no time to close": ("drain.marginSeconds=1", "'/drain/marginSeconds': minimum"),
    "memory that is no quantity": ("resources.limits.memory=lots", "'/resources/limits/memory'"),
    "an autoscaler that there is none of": (
        "autoscaling.kind=vpa",
        "'/autoscaling/kind': value must be",
    ),
    "a target of nothing": ("autoscaling.target=0", "'/autoscaling/target': exclusiveMinimum"),
    "fewest servers above the most": (
        "autoscaling.enabled=true,autoscaling.minReplicas=11",
        "autoscaling.minReplicas: is 11, want at most maxReplicas 10",
    ),
    "a digest that is none": ("image.digest=latest", "'/image/digest'"),
    "a spread without its key": ("topologySpread[0].maxSkew=1", "missing properties 'topologyKey'"),
}


@pytest.mark.parametrize("case", WRONG_TURNS)
def test_a_wrong_value_is_refused_by_name(helm_template, case):
    values, message = WRONG_TURNS[case]
    done = helm_template("--set", values)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.fixture(scope="module")
def generate():
    """The program that writes what follows from elsewhere."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "deploy" / "helm" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_takes_the_settings_that_the_server_has(generate):
    assert generate.schema() == (CHART / "values.schema.json").read_text(), "run deploy/helm/generate.py"


def test_the_readme_holds_the_values_as_they_are(generate):
    assert generate.readme() == (CHART / "README.md").read_text(), "run deploy/helm/generate.py"


def test_every_value_is_documented(generate):
    documented = {tuple(path.split(".")) for path, _, _ in generate.documented_values()}

    def undocumented(values, path=()):
        for key, value in values.items():
            if (*path, key) not in documented:
                yield from undocumented(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]

    assert list(undocumented(yaml.safe_load((CHART / "values.yaml").read_text()))) == []


def test_the_schema_has_every_value_and_no_other():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    for name, part in values.items():
        if "properties" in schema["properties"][name] and name != "config":
            assert schema["properties"][name]["properties"].keys() == part.keys()


def test_an_address_of_ipv6_is_written_as_one(helm_template):
    done = helm_template("--set", "host=::")
    assert 'listen = ["[::]:50051"]' in done.stdout
    assert 'metrics_host = "::"' in done.stdout


def test_nobody_is_left_in_the_dark_about_plain_text(tools):
    def notes(*arguments):
        command = ("install", "loss", CHART, "--dry-run=client", *arguments)
        done = tools.run("helm", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:")[2]

    assert "plain text and nobody is asked who they are" in notes()
    assert "Everyone who reaches the Service may call" in notes("--set", "networkPolicy.enabled=false")
    assert "plain text" not in notes("--set", "tls.enabled=true,tls.secretName=x")
    assert "unix:///run/lossd/lossd.sock" in notes("--set", "mode=sidecar,trainer.image=x")
