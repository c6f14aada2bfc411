"""The examples: a worker that does its share, manifests and queries that are taken."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import yaml

from lossd_client import Client, FCOSAssigner
from tests.deploy.objects import containers, pod_spec, the
from tests.deploy.tools import ROOT, missing
from tests.whole.conftest import serving

EXAMPLES = ROOT / "deploy" / "examples"
WORKER = EXAMPLES / "pipeline_worker.py"


@pytest.fixture(scope="module")
def target():
    with serving() as (_, address, _):
        yield address


@pytest.fixture
def annotations(tmp_path):
    """Three images, one of them without an object and one with a crowd."""
    boxes = {1: [[10, 20, 100, 80]], 2: [], 3: [[0, 0, 300, 200], [50, 60, 40, 30]]}
    coco = {
        "images": [{"id": i, "height": 400, "width": 500 + i} for i in boxes],
        "categories": [{"id": 7}, {"id": 9}],
        "annotations": [
            {"image_id": i, "bbox": box, "category_id": 9, "iscrowd": int(place)}
            for i, of_image in boxes.items()
            for place, box in enumerate(of_image)
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco))
    return path


def work(*arguments, **environment):
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def share(annotations, output, target, index, count):
    environment = {"JOB_COMPLETION_INDEX": str(index), "WORKER_COUNT": str(count), "LOSSD_TARGET": target}
    done = work(annotations, output, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_workers_do_the_whole_between_them(annotations, tmp_path, target):
    output = tmp_path / "targets"
    first, second = (share(annotations, output, target, index, 2) for index in range(2))
    assert (first["images"], second["images"]) == (2, 1)
    assert sorted(path.name for path in output.iterdir()) == ["1.npz", "2.npz", "3.npz"]
    assert len(np.load(output / "2.npz")["labels"]) == 0
    assert len(np.load(output / "3.npz")["ignored"]) > 0


def test_a_worker_writes_what_a_call_gives(annotations, tmp_path, target):
    share(annotations, tmp_path / "targets", target, 0, 1)
    with Client(target) as client:
        truth = [{"boxes": np.array([[10, 20, 110, 100]], np.float32), "labels": np.array([1])}]
        expected = client.assign_targets(FCOSAssigner(), truth, image_size=(400, 501), sparse=True)
    written = np.load(tmp_path / "targets" / "1.npz")
    assert len(written["labels"]) == sum(expected.positive_counts) > 0
    for name in ("locations", "labels", "ltrb", "centerness"):
        np.testing.assert_array_equal(written[name], getattr(expected, name))


def test_a_worker_that_is_started_again_does_what_is_left(annotations, tmp_path, target):
    share(annotations, tmp_path / "targets", target, 0, 1)
    (tmp_path / "targets" / "1.npz").unlink()
    assert share(annotations, tmp_path / "targets", target, 0, 1)["images"] == 1


def test_a_worker_does_real_annotations(coco_file, tmp_path, target):
    assert share(coco_file, tmp_path / "targets", target, 0, 1)["images"] == 100


def test_a_worker_without_a_server_fails_and_says_so(annotations, tmp_path):
    done = work(annotations, tmp_path / "targets", "--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert "pipeline_worker: UnavailableError" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_without_annotations_fails_and_says_so(tmp_path, target):
    done = work(tmp_path / "none.json", tmp_path / "targets", "--target", target)
    assert (done.returncode, "FileNotFoundError" in done.stderr) == (1, True)


@pytest.mark.parametrize("folder", ["examples", "envoy"])
def test_kubernetes_takes_the_manifests(tools, folder):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    done = tools.run("kubectl", "kustomize", ROOT / "deploy" / folder)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    for found in objects:
        kubernetes_validate.validate(found, "1.30", strict=True)
    pod, (made,) = pod_spec(objects), [found for found in objects if found["kind"] == "ConfigMap"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = containers(pod)
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert made["metadata"]["name"] in {v["configMap"]["name"] for v in volumes.values() if "configMap" in v}


def test_the_examples_call_what_the_chart_makes(rendered, tools):
    job = the(list(yaml.safe_load_all(tools.run("kubectl", "kustomize", EXAMPLES).stdout)), "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    services = tools.run(
        "helm", "template", "lossd", ROOT / "deploy/helm/lossd", "-s", "templates/services.yaml"
    )
    names = {found["metadata"]["name"] for found in yaml.safe_load_all(services.stdout) if found}
    assert re.fullmatch(r"dns:///(.*):50051", environment["LOSSD_TARGET"])[1] in names
    assert environment["WORKER_COUNT"] == str(job["spec"]["completions"])
    assert "address: lossd-headless, port_value: 50051" in (ROOT / "deploy/envoy/envoy.yaml").read_text()


def adapter_queries():
    rules = yaml.safe_load((EXAMPLES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    filled = {"<<.LabelMatchers>>": 'pod="x"', "<<.GroupBy>>": "pod"}
    for rule in rules:
        query = rule["metricsQuery"]
        for placeholder, value in filled.items():
            query = query.replace(placeholder, value)
        yield rule["name"]["as"], query


def scaled_queries(rendered):
    for metric in ("inFlight", "queueSeconds"):
        (trigger,) = the(rendered("keda", "--set", f"autoscaling.metric={metric}"), "ScaledObject")["spec"][
            "triggers"
        ]
        yield f"keda:{metric}", trigger["metadata"]["query"]


def test_prometheus_takes_the_queries_of_autoscalers(rendered, tmp_path):
    promtool = shutil.which("promtool") or missing("no promtool: apt-get install prometheus")
    queries = dict([*adapter_queries(), *scaled_queries(rendered)])
    rules = [{"record": f"x:{i}", "expr": query} for i, query in enumerate(queries.values())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = [promtool, "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_autoscalers_go_by_metrics_that_the_server_has(rendered, tmp_path):
    with serving() as (_, address, line):
        port = re.search(r"metrics_port\D+(\d+)", line)[1]
        with Client(address) as client:
            client.assign_targets(
                FCOSAssigner(), [{"boxes": np.zeros((0, 4)), "labels": []}], image_size=(64, 64)
            )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            series = answer.read().decode()
    for query in dict([*adapter_queries(), *scaled_queries(rendered)]).values():
        for name in re.findall(r"lossd_\w+", query):
            assert re.search(rf"^{name}\{{", series, re.MULTILINE)
    assert 'stage="queue"' in series


def test_the_hpa_asks_for_what_the_adapter_offers(rendered):
    offered = {name for name, _ in adapter_queries()}
    for metric in ("inFlight", "queueSeconds"):
        (asked,) = the(rendered("hpa", "--set", f"autoscaling.metric={metric}"), "HorizontalPodAutoscaler")[
            "spec"
        ]["metrics"]
        assert asked["pods"]["metric"]["name"] in offered
