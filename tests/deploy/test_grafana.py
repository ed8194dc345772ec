"""The dashboards are those of their source and lie tidily; that their queries find something is an integration test."""

import json
from collections import Counter
from typing import Any

import pytest
import yaml

from deploy.grafana.panels import DATASOURCE
from deploy.grafana.render import DASHBOARDS, rendered

PROVISIONING = DASHBOARDS.parent / "provisioning"
FILES = sorted(DASHBOARDS.glob("*.json"))
SCHEMA_VERSION = 39
COLUMNS = 24
UNITS = {"reqps", "ops", "s", "percentunit", "bytes", "short"}


def load(name: str) -> dict[str, Any]:
    return json.loads((DASHBOARDS / name).read_text())


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param.name)


def test_the_files_are_rendered_from_their_source() -> None:
    assert {file.name: file.read_text() for file in FILES} == rendered(), "run `make docs`"


def test_names_are_unique() -> None:
    dashboards = [load(file.name) for file in FILES]
    for name in ("uid", "title"):
        assert len({each[name] for each in dashboards}) == len(dashboards)
    assert {f"{each['uid']}.json" for each in dashboards} == {file.name for file in FILES}


def test_ids_are_unique_and_every_panel_is_described(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] >= SCHEMA_VERSION
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


def test_panels_fill_the_grid_without_overlap(dashboard: dict[str, Any]) -> None:
    cells: Counter[tuple[int, int]] = Counter()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells.update((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"]))
    assert set(cells.values()) == {1}
    assert len(cells) == COLUMNS * (1 + max(y for _, y in cells))


def test_queries_go_to_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    source, *others = dashboard["templating"]["list"]
    assert (source["name"], source["current"]["value"]) == ("datasource", DATASOURCE)
    assert [each["datasource"] for each in others] == [chosen] * len(others)
    for panel in panels(dashboard):
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_provisioning_leads_to_them() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())["datasources"]
    written = yaml.safe_load((DASHBOARDS.parent.parent / "prometheus/prometheus.yml").read_text())
    assert source["uid"] == DATASOURCE
    assert source["jsonData"]["timeInterval"] == written["global"]["scrape_interval"]
