"""The alerts, the dashboard and the guide name metrics that exist, and every metric is explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.support.console import sections_of
from tests.support.paths import ROOT
from worker.reports.counts import APPLIED, HALTS
from worker.reports.metrics import exposition, read_figures
from worker.resources import Resources

PROMTOOL = shutil.which("promtool")
SOURCES = ("deploy/alerts.yml", "deploy/grafana.json", "docs/monitoring.md")


def named_in(source: str) -> set[str]:
    return set(re.findall(r"\bmeterfall_[a-z_]+", (ROOT / source).read_text(encoding="utf-8")))


def exposed(resources: Resources) -> dict[str, str]:
    """The names of all metrics, with samples or not, and their types."""
    text = exposition(read_figures(resources), {}).decode()
    return dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE))


def test_alerts_dashboard_and_guide_name_metrics_that_exist(redis: Redis, resources: Resources) -> None:
    names = exposed(resources)
    assert len(names) > 30
    # As Prometheus stores a histogram.
    parts = {
        name + part for name, kind in names.items() if kind == "histogram" for part in ("_bucket", "_sum", "_count")
    }
    unknown = {source: sorted(named_in(source) - names.keys() - parts) for source in SOURCES}
    assert unknown == {source: [] for source in SOURCES}
    assert sorted(names.keys() - named_in("docs/monitoring.md")) == []


def test_the_dashboard_has_a_query_in_each_panel_and_each_alert_a_remedy() -> None:
    panels = json.loads((ROOT / "deploy/grafana.json").read_text(encoding="utf-8"))["panels"]
    assert all("meterfall_" in target["expr"] for panel in panels for target in panel["targets"])
    alerts = (ROOT / "deploy/alerts.yml").read_text(encoding="utf-8").split("- alert: ")[1:]
    assert len(alerts) > 10
    assert all("remedy: " in alert and "meterfall_" in alert for alert in alerts)
    explained = sections_of((ROOT / "docs/monitoring.md").read_text(encoding="utf-8"))
    assert list(explained) == [alert.splitlines()[0] for alert in alerts]


# Panels of Grafana itself, which need no plugin.
PANELS = {"barchart", "bargauge", "gauge", "heatmap", "row", "stat", "state-timeline", "table", "text", "timeseries"}
COLUMNS = 24


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "deploy/grafana.json").read_text(encoding="utf-8"))
    return found


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """As far as that goes without Grafana: see its JSON model of a dashboard."""
    board = dashboard()
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", board["uid"])
    assert board.get("id") is None, "Grafana gives the id"
    assert board["schemaVersion"] >= 36, "from then on a datasource is an object"
    (variable,) = board["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels) > 10
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in PANELS
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)
        for target in panel["targets"]:
            labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert labels == re.findall(r"^\w+ by \((\w+)\)", target["expr"]), (
                "the legend names the labels that are left"
            )
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & covered, f"{panel['title']} lies over another panel"
        cells |= covered


@pytest.mark.skipif(PROMTOOL is None, reason="promtool of Prometheus is not installed")
def test_prometheus_takes_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    # Grafana puts a span in the place of this, at least four scrapes long.
    rules = [{"record": "a:b", "expr": query.replace("$__rate_interval", "1m")} for query in queries]
    groups = [{"name": str(number), "rules": [rule]} for number, rule in enumerate(rules)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": groups}), encoding="utf-8")
    done = subprocess.run(
        [PROMTOOL, "check", "rules", "--lint=none", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert f"{len(queries)} rules found" in done.stdout


@pytest.mark.skipif(PROMTOOL is None, reason="promtool of Prometheus is not installed")
def test_prometheus_takes_the_alerts_and_the_metrics(redis: Redis, resources: Resources) -> None:
    assert PROMTOOL is not None
    rules = subprocess.run([PROMTOOL, "check", "rules", ROOT / "deploy/alerts.yml"], capture_output=True, check=False)
    assert rules.returncode == 0, rules
    text = exposition(read_figures(resources), {(APPLIED.name, ""): 1, (HALTS.name, "UndefinedTable"): 1})
    metrics = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
    assert metrics.returncode == 0, metrics
