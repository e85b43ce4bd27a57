"""The alerts, the dashboard and the guide name metrics that exist, and every metric is explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

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


@pytest.mark.skipif(PROMTOOL is None, reason="promtool of Prometheus is not installed")
def test_prometheus_takes_the_alerts_and_the_metrics(redis: Redis, resources: Resources) -> None:
    assert PROMTOOL is not None
    rules = subprocess.run([PROMTOOL, "check", "rules", ROOT / "deploy/alerts.yml"], capture_output=True, check=False)
    assert rules.returncode == 0, rules
    text = exposition(read_figures(resources), {(APPLIED.name, ""): 1, (HALTS.name, "UndefinedTable"): 1})
    metrics = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
    assert metrics.returncode == 0, metrics
