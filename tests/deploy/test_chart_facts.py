"""What schemas miss: that the rendered objects fit together, and fit the server."""

import math

import pytest
import yaml

from tests.deploy.conftest import CASES
from tests.deploy.objects import (
    config,
    containers,
    of_kind,
    pod_spec,
    pod_specs,
    quantity,
    selects,
    server,
    settings,
    the,
    workload,
)  # fmt: skip
from tests.deploy.tools import CHART

SERVERS = tuple(case for case in CASES if case != "sidecar")
RECOMMENDED = {
    f"app.kubernetes.io/{name}"
    for name in ("name", "instance", "version", "component", "part-of", "managed-by")
} | {"helm.sh/chart"}


@pytest.fixture(params=CASES)
def objects(request, rendered):
    return rendered(request.param)


@pytest.fixture(params=SERVERS)
def server_objects(request, rendered):
    return rendered(request.param)


def pod_labels(objects):
    return workload(objects)["spec"]["template"]["metadata"]["labels"]


def test_every_object_has_the_recommended_labels_and_a_name_of_its_own(objects):
    for found in objects:
        assert found["metadata"]["labels"].keys() >= RECOMMENDED
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(names)) == len(names)


def test_selectors_select_the_servers_and_not_the_pod_of_the_test(server_objects):
    deployment = the(server_objects, "Deployment")
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in of_kind(server_objects, "Service")]
    selectors += [
        spread["labelSelector"]["matchLabels"]
        for spread in pod_spec(server_objects).get("topologySpreadConstraints", [])
    ]
    for found in of_kind(server_objects, "PodDisruptionBudget"):
        selectors.append(found["spec"]["selector"]["matchLabels"])
    for found in of_kind(server_objects, "NetworkPolicy"):
        selectors.append(found["spec"]["podSelector"]["matchLabels"])
    for selector in selectors:
        assert selects(selector, pod_labels(server_objects))
        for test in of_kind(server_objects, "Pod"):
            assert not selects(selector, test["metadata"]["labels"])


def test_selectors_do_not_change_with_the_version(objects):
    for found in of_kind(objects, "Deployment"):
        assert (
            not {"app.kubernetes.io/version", "helm.sh/chart"}
            & found["spec"]["selector"]["matchLabels"].keys()
        )


def test_the_monitor_reads_each_server_once(rendered):
    objects = rendered("keda")
    (endpoint,) = the(objects, "ServiceMonitor")["spec"]["endpoints"]
    selector = the(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    read = [
        service["metadata"]["name"]
        for service in of_kind(objects, "Service")
        if selects(selector, service["metadata"]["labels"])
        and endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    ]
    assert read == ["loss-lossd-headless"]


def test_rules_and_dashboard_are_the_files_of_the_chart(rendered):
    objects = rendered("hpa")
    assert the(objects, "PrometheusRule")["spec"] == yaml.safe_load((CHART / "files/rules.yml").read_text())
    (dashboard,) = [found for found in of_kind(objects, "ConfigMap") if "lossd.json" in found["data"]]
    assert dashboard["data"]["lossd.json"] == (CHART / "files/dashboard.json").read_text()
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_pod_monitor_finds_the_sidecars(rendered):
    objects = rendered("sidecar")
    spec = the(objects, "PodMonitor")["spec"]
    assert selects(spec["selector"]["matchLabels"], pod_labels(objects))
    assert spec["podMetricsEndpoints"][0]["port"] in {port["name"] for port in server(objects)["ports"]}


def test_services_lead_to_ports_that_the_server_listens_on(server_objects):
    settings = config(server_objects)
    ports = {port["name"]: port["containerPort"] for port in server(server_objects)["ports"]}
    assert settings.listen[0].rpartition(":")[2] == str(ports["grpc"])
    assert settings.metrics_port == ports["metrics"]
    for service in of_kind(server_objects, "Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]


def test_of_the_services_one_has_an_address_and_one_has_none(server_objects):
    addresses = {
        s["metadata"]["name"]: s["spec"].get("clusterIP") for s in of_kind(server_objects, "Service")
    }
    assert addresses == {"loss-lossd": None, "loss-lossd-headless": "None"}


def test_the_network_policy_names_ports_of_the_server(rendered):
    (calls, scrapes) = the(rendered("default"), "NetworkPolicy")["spec"]["ingress"]
    names = {port["name"] for port in server(rendered("default"))["ports"]}
    assert {rule["port"] for ingress in (calls, scrapes) for rule in ingress["ports"]} == names
    test_labels = the(rendered("default"), "Pod")["metadata"]["labels"]
    assert any(selects(peer["podSelector"].get("matchLabels", {}), test_labels) for peer in calls["from"])


def test_nothing_goes_out_unless_it_is_said_so(rendered):
    spec = the(rendered("default"), "NetworkPolicy")["spec"]
    assert "Egress" in spec["policyTypes"]
    assert spec["egress"] == []


def test_requests_are_within_limits(objects):
    for pod in pod_specs(objects):
        for container in containers(pod):
            resources = container.get("resources", {})
            for name, asked in resources.get("requests", {}).items():
                assert quantity(asked) <= quantity(resources["limits"].get(name, asked))


def test_memory_is_enough_for_the_requests_that_are_let_in(objects):
    needed = 3 * config(objects).max_in_flight_bytes + (512 << 20)
    assert quantity(server(objects)["resources"]["limits"]["memory"]) >= needed


def test_every_mounted_volume_exists_and_every_volume_is_mounted(objects):
    for pod in pod_specs(objects):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        mounts = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
        assert {mount["name"] for mount in mounts} == volumes
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(set(paths)) == len(paths)


def test_config_maps_and_accounts_that_are_named_exist(objects):
    names = {(found["kind"], found["metadata"]["name"]) for found in objects}
    pod = pod_spec(objects)
    ours = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v and v["name"] == "config"]
    assert {("ConfigMap", name) for name in ours} <= names
    account = pod["serviceAccountName"]
    assert account == "default" or ("ServiceAccount", account) in names


def test_pods_may_do_little(objects):
    for pod in pod_specs(objects):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # LOSSD_PORT and the like would be read as settings
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }


def test_where_the_root_is_read_only_what_is_written_has_a_volume(objects):
    empty = {volume["name"] for volume in pod_spec(objects)["volumes"] if "emptyDir" in volume}
    writable = {m["mountPath"] for m in server(objects)["volumeMounts"] if m["name"] in empty}
    assert {"/tmp", "/var/cache/lossd"} <= writable  # noqa: S108  # a path in the pod
    for address in config(objects).listen:
        if address.startswith("unix://"):
            assert address.removeprefix("unix://").rpartition("/")[0] in writable


def test_the_server_takes_its_settings(objects):
    made = config(objects)
    mounts = [mount["mountPath"] for mount in server(objects)["volumeMounts"] if mount.get("readOnly")]
    for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens"):
        path = getattr(made, name)
        assert path is None or any(path.startswith(f"{mount}/") for mount in mounts)
    open_to_others = [address for address in made.listen if not address.startswith("unix:")]
    assert made.insecure == (made.tls_cert is None and bool(open_to_others))


def test_whole_numbers_stay_whole(rendered):
    assert config(rendered("gpu")).max_message_bytes == 536870912
    assert "max_message_bytes = 536870912\n" in settings(rendered("gpu"))


def test_a_pod_may_take_as_long_as_its_drain(objects):
    drain = config(objects).drain_seconds
    hook = server(objects).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    closing = 5.5  # what `Server.stop` waits for after the drain
    assert pod_spec(objects)["terminationGracePeriodSeconds"] > math.ceil(drain + hook + closing)


def test_a_change_of_settings_makes_new_pods(rendered):
    def checksum(*arguments):
        template = workload(rendered("default", *arguments))["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum() == checksum("--set", "replicas=3")
    assert checksum() != checksum("--set", "config.max_streams=7")


def test_probes_ask_the_kubelets_way_where_it_can(rendered):
    container = server(rendered("default"))
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["grpc"]["port"] == container["ports"][0]["containerPort"]
    assert container["readinessProbe"]["grpc"]["service"] == "lossd.v1.LossService"


@pytest.mark.parametrize("case", ["tls", "mtls-tokens", "sidecar"])
def test_probes_ask_over_a_socket_where_the_kubelet_cannot(rendered, case):
    container = server(rendered(case))
    socket = config(rendered(case)).listen[-1]
    assert socket.startswith("unix:///")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["exec"]["command"][:3] == ["lossd", "health", socket]


def test_a_gpu_is_asked_for_as_a_limit(rendered):
    assert server(rendered("gpu"))["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert server(rendered("gpu"))["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in server(rendered("default"))["resources"]["limits"]


def test_an_autoscaler_alone_decides_how_many_servers_there_are(rendered):
    for case, kind in {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}.items():
        objects = rendered(case)
        assert "replicas" not in the(objects, "Deployment")["spec"]
        assert (
            the(objects, kind)["spec"]["scaleTargetRef"]["name"]
            == the(objects, "Deployment")["metadata"]["name"]
        )
    assert the(rendered("default"), "Deployment")["spec"]["replicas"] == 2


def test_the_sidecar_serves_before_the_trainer_starts_and_ends_after_it(rendered):
    pod = pod_spec(rendered("sidecar"))
    (sidecar,) = pod["initContainers"]
    (trainer,) = pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    assert "startupProbe" in sidecar
    target = {variable["name"]: variable["value"] for variable in trainer["env"]}["LOSSD_TARGET"]
    assert config(rendered("sidecar")).listen == (target,)
    shared = {mount["name"]: mount["mountPath"] for mount in trainer["volumeMounts"]}
    assert target == f"unix://{shared['socket']}/lossd.sock"
    for container in (sidecar, trainer):  # one user, or the server shares no memory
        assert "runAsUser" not in container["securityContext"]
