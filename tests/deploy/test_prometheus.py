"""Prometheus's own tool on the configuration, the rules and the tests of the alerts; and each alert's page for who is called."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from app.local_triton import HOST, Ports
from app.settings import Settings
from tests import prometheus
from tests.prometheus import DEPLOY

ROOT = DEPLOY.parent.parent
SEVERITIES = {"critical", "warning"}


def rules(file: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((DEPLOY / file).read_text())["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml", "local.yml"),
        ("check", "rules", "rules.yml", "alerts.yml"),
        ("test", "rules", "tests.yml"),
    ],
    ids=" ".join,
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([prometheus.require("promtool"), *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_silent_and_firing() -> None:
    cases = [case for test in yaml.safe_load((DEPLOY / "tests.yml").read_text())["tests"] for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert firing == silent == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor == alert["alert"].lower()
    assert f"### {alert['alert']}\n" in (ROOT / page).read_text()


def test_operations_explains_no_alert_that_does_not_exist() -> None:
    explained = re.findall(r"^### ((?:Vitrine|Triton)[A-Z]\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert explained == [alert["alert"] for alert in ALERTS]


def test_recorded_rules_are_named_by_level_metric_and_operation() -> None:
    for rule in rules("rules.yml"):
        assert re.fullmatch(r"[a-z_]+:[a-z_]+:[a-z0-9_]+", rule["record"])
        level = rule["record"].partition(":")[0]
        assert f"by ({', '.join(level.split('_'))}" in rule["expr"]


def test_every_file_of_the_folder_has_its_use() -> None:
    written = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert {*written["rule_files"], "prometheus.yml", "local.yml", "tests.yml"} == {file.name for file in DEPLOY.iterdir()}


def test_locally_only_the_targets_differ() -> None:
    containers, local = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("prometheus.yml", "local.yml"))
    targets = {job["job_name"]: job.pop("static_configs")[0]["targets"] for job in local["scrape_configs"]}
    for job in containers["scrape_configs"]:
        del job["static_configs"]
    assert local == containers
    gateway = Settings(_env_file=None)
    assert targets == {"vitrine": [f"{gateway.host}:{gateway.port}"], "triton": [f"{HOST}:{Ports().metrics}"]}
