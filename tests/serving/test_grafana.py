"""The Grafana dashboard asks for metrics and labels that a server has."""

import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.serving.servers import SMALL

DASHBOARD = Path(__file__).parents[2] / "docs/grafana/flowroll.json"
# What Prometheus adds to every series.
ADDED = {"job", "instance"}


def test_every_query_of_the_dashboard_is_about_series_that_a_server_has(server: httpx.Client) -> None:
    # One of each, so that labelled series exist.
    assert server.post("/rollout/generate", json=SMALL).status_code == 200
    assert server.post("/rollout/generate", json={**SMALL, "height": 1}).status_code == 422
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        # A labelled metric that has counted nothing yet has a name alone.
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels.setdefault(name, set())
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:flowroll|process)_\w+", query)}
    assert len(asked) > 20 and asked <= labels.keys(), asked - labels.keys()
    for query in queries:
        for name, selectors in re.findall(r"((?:flowroll|process)_\w+)\{(.*?)\}", query):
            used = set(re.findall(r"(\w+)=", selectors))
            assert ADDED <= used <= ADDED | labels[name], query
        for grouped, name in re.findall(r"by \(([\w, ]+)\) \((?:rate\(|increase\()?(\w+)\{", query):
            assert not labels[name] or set(grouped.split(", ")) <= labels[name], query
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) == variables | {"__all"}


def test_the_panels_of_the_dashboard_fill_its_grid_without_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells: list[tuple[int, int]] = []
    for grid in (panel["gridPos"] for panel in panels):
        columns, rows = range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        cells += [(column, row) for column in columns for row in rows]
    assert len(cells) == len(set(cells)) == 24 * (1 + max(row for _, row in cells))
