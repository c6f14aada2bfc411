"""Every alert fires when it should and is silent when it should be, by `promtool test rules`."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.deploy.rule_cases import FIRES, SILENT
from tests.deploy.tools import ROOT, missing

RULES = ROOT / "deploy" / "helm" / "lossd" / "files" / "rules.yml"
RUNBOOKS = ROOT / "deploy" / "runbooks.md"
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


@pytest.fixture(scope="session")
def promtool():
    path = shutil.which("promtool")
    if path is None:
        missing("no promtool on this machine: Debian's package prometheus has it")
    return path


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def as_yaml(alert, case):
    """A case as a test of promtool: also that an alert is silent until its reason has lasted."""
    rule = ALERTS[alert]
    fixed = f'alertname="{alert}",alertstate="firing",severity="{rule["labels"]["severity"]}"'
    expected = [
        {"labels": f"ALERTS{{{fixed}{',' if labels else ''}{labels}}}", "value": 1} for labels in case.labels
    ]
    lasts = int(rule.get("for", "0m").removesuffix("m"))
    looks = {case.minute: expected} | ({case.begins + lasts - 1: []} if lasts else {})
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
                "eval_time": f"{minute}m",
                "exp_samples": samples,
            }
            for minute, samples in looks.items()
        ],
    }


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_when_it_should_and_not_otherwise(promtool, tmp_path, alert):
    assert all(case.labels for case in FIRES[alert])
    assert not any(case.labels for case in SILENT[alert])
    cases = [as_yaml(alert, case) for case in (*FIRES[alert], *SILENT[alert])]
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}))
    done = run(promtool, "test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_cases_that_fire_and_cases_that_do_not():
    assert ALERTS.keys() == FIRES.keys() == SILENT.keys()
    assert all(FIRES.values())
    assert all(SILENT.values())


def test_rules_and_the_configuration_of_compose_are_right(promtool, tmp_path):
    done = run(promtool, "check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (RULES, ROOT / "deploy" / "prometheus" / "prometheus.yml"):
        shutil.copy(path, tmp_path)
    done = run(promtool, "check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_means_and_where_to_read_on(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"deploy/runbooks.md#{alert.lower()}"


def test_the_runbooks_are_those_of_the_alerts():
    assert re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.MULTILINE) == list(ALERTS)
