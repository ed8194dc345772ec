"""A real Prometheus watches two gateways and the real Triton under load: every panel, rule and alert finds what it asks for.

One gateway uses Triton, the other its embedded engine, since each has series that the other lacks.
"""

import json
import math
import re
import time
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from PIL import Image

from app.metrics import REQUEST_BUCKETS
from tests import prometheus, triton
from tests.factories import encode
from tests.gateway import gateway
from tests.prometheus import Prometheus
from tests.repository import add_entry

pytestmark = pytest.mark.triton

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GOOD = encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG")
TRUNCATED, NO_IMAGE = GOOD[:60], b"this is no image"
FAST, SLOW = "colours", "slow"
ROUNDS, FAST_PER_ROUND = 6, 25
PLACES = 4  # requests that the embedded gateway takes at a time
SCRAPES = 3.0  # seconds, as many as scrapes
QUIET = {
    *("VitrineDown", "VitrineBackendDown", "VitrineTritonAway", "VitrineNoModel", "VitrineModelGone", "VitrineModelBroken"),
    *("TritonDown", "TritonFailing"),
}

SELECTOR = re.compile(r"\b(?:up\b|(?:vitrine|nv|process)_\w+|\w+:\w+:\w+)(?:\{[^}]*\})?")


def rules(file: str) -> list[Any]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / file).read_text())["groups"]
    return [pytest.param(rule, id=rule.get("record") or rule["alert"]) for group in groups for rule in group["rules"]]


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))]


def panel_queries() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{dashboard['uid']}-{panel['title']}-{target['refId']}")
        for dashboard in dashboards()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def variables() -> list[Any]:
    return [
        pytest.param(variable["query"]["query"], id=f"{dashboard['uid']}-{variable['name']}")
        for dashboard in dashboards()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]


@dataclass
class Traffic:
    """Asks one gateway to classify, and keeps the seconds that each answer of status 200 took, and all statuses."""

    url: str
    seconds: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def ask(self, client: httpx2.Client, model: str, content: bytes = GOOD) -> None:
        started = time.perf_counter()
        status = client.post("/v1/classify", params={"model": model}, content=content).status_code
        if status == 200:
            self.seconds.append(time.perf_counter() - started)
        self.statuses.append(status)

    def flow(self) -> None:
        """One client, its requests one after the other: most are fast, one in a few slow, and some cannot be answered."""
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            for _ in range(ROUNDS):
                for _ in range(FAST_PER_ROUND):
                    self.ask(client, FAST)
                self.ask(client, SLOW)
                self.ask(client, FAST, TRUNCATED)
                self.ask(client, FAST, NO_IMAGE)

    def burst(self) -> None:
        """More at a time than the gateway takes."""
        with httpx2.Client(base_url=self.url, timeout=60) as client, ThreadPoolExecutor(3 * PLACES) as pool:
            list(pool.map(lambda _: self.ask(client, SLOW), range(3 * PLACES)))


@dataclass(frozen=True)
class Watched:
    prometheus: Prometheus
    remote: Traffic
    embedded: Traffic

    def has_data(self, expression: str) -> bool:
        return any(math.isfinite(value) for _, value in self.prometheus.query(expression))


def instance(traffic: Traffic) -> str:
    return traffic.url.removeprefix("http://")


def substitute(expression: str, **chosen: str) -> str:
    """A panel's query as Grafana sends it, with these values chosen in the dashboard's lists, and `All` in the others."""
    values = {"__rate_interval": "5m", "instance": ".+", "model": ".+"} | chosen
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    prometheus.require()
    folder = tmp_path_factory.mktemp("watched")
    add_entry(folder / "repository", FAST)
    add_entry(folder / "repository", SLOW, delay=512)
    with ExitStack() as stack:
        server = stack.enter_context(triton.serve(folder / "repository"))
        settings: dict[str, Any] = {"repository": folder / "repository", "default_classify": FAST}
        remote = Traffic(stack.enter_context(gateway(**settings, backend="triton", triton_url=server.url)))
        embedded = Traffic(stack.enter_context(gateway(**settings, max_requests=PLACES, instances=1)))
        for traffic in (remote, embedded):
            httpx2.post(f"{traffic.url}/v1/classify?model={SLOW}", content=GOOD, timeout=60).raise_for_status()
        targets = {"vitrine": [instance(remote), instance(embedded)], "triton": [f"127.0.0.1:{server.ports.metrics}"]}
        watcher = stack.enter_context(prometheus.serve(folder / "prometheus", targets))
        watcher.wait_for("count (up == 1) == 3")
        before = sum(value for _, value in watcher.query('vitrine_request_seconds_count{code="200"}'))

        remote.flow()
        embedded.flow()
        embedded.burst()
        answered = len(remote.seconds) + len(embedded.seconds)
        watcher.wait_for(f'sum (vitrine_request_seconds_count{{code="200"}}) == {before + answered}')
        time.sleep(SCRAPES)
        yield Watched(watcher, remote, embedded)


def test_the_load_met_what_it_was_meant_to(watched: Watched) -> None:
    assert set(watched.remote.statuses) == {200, 415, 422}
    assert set(watched.embedded.statuses) == {200, 415, 422, 429}
    ((_, rejected),) = watched.prometheus.query("sum (vitrine_rejected_total)")
    assert rejected == watched.embedded.statuses.count(429)


@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
@pytest.mark.parametrize("expression", panel_queries())
def test_every_query_of_every_panel_finds_data(watched: Watched, expression: str, every: bool) -> None:
    asked = substitute(expression) if every else substitute(expression, instance=instance(watched.embedded), model=FAST)
    assert watched.has_data(asked), asked
    for selector in SELECTOR.findall(asked):
        assert watched.has_data(selector), selector


@pytest.mark.parametrize("query", variables())
def test_every_list_of_a_dashboard_has_entries(watched: Watched, query: str) -> None:
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert match is not None
    assert watched.prometheus.get(f"label/{match[2]}/values", **{"match[]": match[1]})


@pytest.mark.parametrize("rule", rules("rules.yml"))
def test_every_recorded_rule_finds_data(watched: Watched, rule: dict[str, str]) -> None:
    assert watched.has_data(f"last_over_time({rule['record']}[10m])")
    for selector in SELECTOR.findall(rule["expr"]):
        assert watched.has_data(selector), selector


@pytest.mark.parametrize("rule", rules("alerts.yml"))
def test_every_alert_looks_at_something_that_is_there(watched: Watched, rule: dict[str, str]) -> None:
    firing = watched.prometheus.query(rule["expr"])
    assert not (firing and rule["alert"] in QUIET)
    selectors = SELECTOR.findall(rule["expr"])
    assert selectors
    for selector in selectors:
        assert watched.has_data(selector), selector


def test_prometheus_evaluates_every_rule_without_an_error(watched: Watched) -> None:
    groups = watched.prometheus.get("rules")["groups"]
    states = {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]}
    assert len(states) == len(rules("rules.yml")) + len(rules("alerts.yml"))
    assert set(states.values()) == {("ok", None)}, states


def test_p99_is_the_clients_own_but_for_the_width_of_a_bucket(watched: Watched) -> None:
    """The client waits a little longer than the gateway measures, so the neighbouring bucket will do."""
    (expression,) = [
        target["expr"]
        for dashboard in dashboards()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        if (dashboard["uid"], panel["title"], target["legendFormat"]) == ("vitrine-overview", "Latency", "p99")
    ]
    ((_, measured),) = watched.prometheus.query(substitute(expression, instance=instance(watched.remote)))
    seconds = sorted(watched.remote.seconds)
    own = seconds[math.ceil(0.99 * len(seconds)) - 1]
    assert abs(bisect_left(REQUEST_BUCKETS, own) - bisect_left(REQUEST_BUCKETS, measured)) <= 1, (own, measured)
