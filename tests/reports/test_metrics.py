"""The metrics: what a scrape shows, and what it leaves out while a server is away."""

from __future__ import annotations

from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from config.settings import Settings
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from worker.client import Billing
from worker.keyspace import keys
from worker.reports.counts import COUNTED
from worker.reports.metrics import Figures, exposition, read_figures
from worker.resources import Resources

Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(figures: Figures | None) -> Samples:
    """The samples of a scrape by name and values of labels, without those that processes count."""
    families = text_string_to_metric_families(exposition(figures, {}).decode())
    system = [family for family in families if family.name not in {metric.name for metric in COUNTED}]
    return {(one.name, tuple(one.labels.values())): one.value for family in system for one in family.samples}


def test_a_scrape_shows_what_waits_and_counts_what_was_done(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    with Billing.connect(settings) as billing:
        billing.emit("u", "credits", 1)
        billing.emit("u", "credits", 1)
    before = samples(read_figures(resources))
    partition = next(labels for (name, labels), value in before.items() if name == "meterfall_partition_lag" and value)
    assert before["meterfall_partition_lag", partition] == 2
    assert before["meterfall_server_up", ("redis",)] == before["meterfall_server_up", ("postgres",)] == 1
    assert before["meterfall_processes", ("worker",)] == 0
    assert before["meterfall_severity", ()] == 2
    assert before["meterfall_redis_may_evict", ()] == 0
    drain(settings, "u")
    after = samples(read_figures(resources))
    assert after["meterfall_partition_lag", partition] == 0
    disposed = "meterfall_partition_disposed_total", partition
    assert after[disposed] - before[disposed] == 2
    assert after["meterfall_partition_ids_left_total", partition] == 2


def test_a_scrape_is_no_scan_however_many_keys_redis_has(redis: Redis, resources: Resources) -> None:
    """A scan takes as long as Redis has keys, and every dyno is scraped."""
    redis.xadd(keys.Partition(11).entries, {"v": "1", "r": "u"})
    redis.config_resetstat()
    figures = read_figures(resources)
    assert figures.status.stranded == {11: 1}
    assert not {name for name in redis.info("commandstats") if name in ("cmdstat_scan", "cmdstat_keys")}


def test_what_is_not_known_has_no_sample(settings: Settings) -> None:
    away = settings_for("postgresql://127.0.0.1:1/none", "redis://127.0.0.1:1/0")
    began = datetime.now(UTC)
    with worker_resources(away) as resources:
        found = samples(read_figures(resources))
    assert (datetime.now(UTC) - began).total_seconds() < 2
    assert found["meterfall_server_up", ("redis",)] == found["meterfall_server_up", ("postgres",)] == 0
    assert not {name for name, _ in found} & {"meterfall_partition_lag", "meterfall_dead_letters_open"}
    assert samples(None) == {("meterfall_read_in_time", ()): 0}
