"""Reading Kubernetes objects."""

import re
import tempfile

from lossd_server.cli.app import serve
from lossd_server.cli.settings import server_config

WORKLOADS = ("Deployment", "Job")
CONFIG_PATH = "/etc/lossd/config/lossd.toml"  # where the chart mounts it
CUSTOM = ("monitoring.coreos.com", "keda.sh")

_POWERS = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


def of_kind(objects, *kinds):
    """Returns the objects of some kinds."""
    return [found for found in objects if found["kind"] in kinds]


def the(objects, kind):
    """Returns the one object of a kind."""
    (found,) = of_kind(objects, kind)
    return found


def workload(objects):
    """Returns the Deployment or the Job."""
    (found,) = of_kind(objects, *WORKLOADS)
    return found


def pod_spec(objects):
    """Returns the pod of the Deployment or the Job."""
    return workload(objects)["spec"]["template"]["spec"]


def pod_specs(objects):
    """Returns every pod that comes of the objects."""
    templates = [found["spec"]["template"] for found in of_kind(objects, *WORKLOADS)]
    return [found["spec"] for found in [*templates, *of_kind(objects, "Pod")]]


def containers(pod):
    """Returns the containers of a pod, those that start it included."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def server(objects):
    """Returns the server's container."""
    (found,) = [container for container in containers(pod_spec(objects)) if container["name"] == "lossd"]
    return found


def settings(objects):
    """Returns the TOML of the server."""
    (found,) = [o["data"]["lossd.toml"] for o in of_kind(objects, "ConfigMap") if "lossd.toml" in o["data"]]
    return found


def config(objects):
    """Returns the settings that `lossd serve` makes of its TOML.

    Raises:
        click.UsageError: It knows one of them not.
        InvalidInputError: A setting has a value that it refuses.
    """
    assert server(objects)["args"] == ["serve", "--config", CONFIG_PATH]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as toml:
        toml.write(settings(objects))
        toml.flush()
        context = serve.make_context("serve", ["--config", toml.name])
    return server_config({name: value for name, value in context.params.items() if name != "log_format"})


def quantity(text):
    """Returns the number that a quantity stands for."""
    number, unit = re.fullmatch(r"([0-9.]+)(\w*)", str(text)).groups()
    return float(number) * _POWERS[unit]


def selects(selector, labels):
    """Returns whether labels have all that a selector asks for."""
    return selector.items() <= labels.items()
