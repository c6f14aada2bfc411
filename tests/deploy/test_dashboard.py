"""The dashboard as a file: made from its source, whole, and about metrics that there are."""

import itertools
import json
import re
import runpy
import sys
from collections import Counter

import grpc
import pytest
import yaml

from lossd.v1 import loss_service_pb2 as pb
from lossd_server.errors import Reason
from lossd_server.rpc.metrics import State
from lossd_server.rpc.stages import STAGES
from tests.deploy.tools import ROOT
from tests.service.test_metric_names import table

GRAFANA = ROOT / "deploy" / "grafana"
FILES = ROOT / "deploy" / "helm" / "lossd" / "files"
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
BUILT_IN = {"__rate_interval"}
LOSSES = pb.DESCRIPTOR.services_by_name["LossService"]
SUFFIXES = ("_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def source():
    """The names of the generator's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GRAFANA))
        yield {name: runpy.run_path(str(GRAFANA / f"{name}.py")) for name in ("generate", "panels")}
    for name in ("panel", "panels"):
        sys.modules.pop(name, None)


def expressions():
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def metrics_in(expression):
    """The names of the metrics that an expression reads."""
    names = re.findall(r"\b(?:grpc_server|lossd|process)_\w+", re.sub(r'"[^"]*"', "", expression))
    return {re.sub(rf"({'|'.join(SUFFIXES)})$", "", name) for name in names}


def test_the_file_is_what_its_source_makes(source):
    assert (FILES / "dashboard.json").read_text() == source["generate"]["text"]()


def test_every_metric_is_on_the_dashboard_or_says_why_not(source):
    shown = set().union(*map(metrics_in, expressions()))
    left_out = source["panels"]["NOT_SHOWN"]
    assert shown | left_out.keys() == table().keys()
    assert not shown & left_out.keys()
    assert all(left_out.values())


def test_every_rule_is_about_metrics_that_there_are():
    groups = yaml.safe_load((FILES / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        expression = rule["expr"]
        for name in re.findall(r"\bjob\w*:\w+:\w+", expression):
            assert name in recorded
            expression = expression.replace(name, "")
        assert metrics_in(expression) <= table().keys(), rule


def test_rules_and_queries_name_labels_by_values_that_there_are():
    """A reason that is renamed would silence its alert."""
    known = {
        "reason": set(Reason),
        "grpc_code": {code.name for code in grpc.StatusCode},
        "stage": set(STAGES),
        "state": {*State, "allocated", "reserved", "free", "total"},
        "outcome": {"ok", "failed"},
        "grpc_type": {"unary", "bidi_stream"},
        "grpc_service": {LOSSES.full_name},
        "grpc_method": set(LOSSES.methods_by_name),
        "method": set(LOSSES.methods_by_name),
    }
    text = (FILES / "rules.yml").read_text() + "\n".join(expressions())
    for label, values in re.findall(r'\b(\w+)(?:=~|!=|=)"([^"$]+)"', text):
        assert set(values.split("|")) <= known[label], label


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    numbers = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert max(numbers.values()) == 1
    places = Counter()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        places.update(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
    assert max(places.values()) == 1


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_has_a_title_a_text_a_unit_and_the_source_that_is_picked(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters) > 0
    assert all(target["legendFormat"] for target in panel["targets"])


def test_titles_are_of_one_panel_each():
    assert max(Counter(panel["title"] for panel in PANELS).values()) == 1


@pytest.mark.parametrize("expression", expressions())
def test_a_query_picks_servers_by_the_variables_and_rates_over_the_interval(expression):
    used = set(re.findall(r"\$(\w+)", expression))
    assert used <= VARIABLES.keys() | BUILT_IN
    assert {"namespace", "job", "instance"} <= used
    assert not re.search(r"\[\d", expression)


def test_variables_pick_all_unless_told_and_fit_where_a_label_is_missing():
    for name in ("namespace", "job", "instance", "method"):
        assert VARIABLES[name]["allValue"] == ".*"
        assert VARIABLES[name]["current"]["value"] == "$__all"
    repeated = {panel["repeat"] for panel in PANELS if "repeat" in panel}
    assert repeated <= VARIABLES.keys()


def test_the_types_of_grafana_find_nothing_wrong(tools):
    done = tools.run("node", "dashboard.mjs", FILES / "dashboard.json")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_grafana_is_told_of_the_dashboard_and_of_prometheus():
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == VARIABLES["datasource"]["query"] == "prometheus"
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/lossd.yml").read_text())["providers"]
    assert provider["type"] == "file"
