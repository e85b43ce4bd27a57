"""The metrics for Prometheus: those of the whole system, and what the processes of one dyno counted.

Every dyno tells the same of the system, but for what it did not read. These metrics are made at the scrape, from the
status and the totals: a few commands per partition. What is not known now has no sample, so an alert on a missing
server names that server, not a backlog of 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

import redis
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from schemas.status import NoticeBacklog, Status
from worker.keyspace import keys
from worker.keyspace.server import SAFE_POLICY
from worker.keyspace.totals import Totals, read_totals
from worker.reports import counts
from worker.reports.counts import Sums
from worker.reports.status import read_status
from worker.resources import Resources

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PARTITION = ("partition",)


class Figures(NamedTuple):
    """What the servers said at one moment. `totals` are None while Redis is away."""

    status: Status
    totals: Mapping[keys.Stream, Totals] | None


def read_figures(resources: Resources) -> Figures:
    """Read status and totals once. A server that does not answer leaves its part out."""
    status = read_status(resources)
    if not status.redis.answers:
        return Figures(status, None)
    try:
        return Figures(status, read_totals(resources.redis, keys.streams(resources.settings.partitions)))
    except redis.RedisError:
        return Figures(status, None)


def exposition(figures: Figures | None, sums: Sums) -> bytes:
    """Return the text of all metrics; without figures, that they could not be read in time.

    `sums` is what the processes of this dyno counted.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(figures, sums))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, figures: Figures | None, sums: Sums) -> None:
        self._figures = figures
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        yield _gauge("meterfall_read_in_time", "1 if the servers were read before the scrape had to be answered",
                     int(self._figures is not None))  # fmt: skip
        yield from _counted(self._sums)
        if self._figures is None:
            return
        status, totals = self._figures
        yield from _servers(status)
        if status.redis.answers:
            yield from _partitions(status)
            yield from _dynos(status)
        yield from _proof(status)
        if status.dead_by_reason is not None:
            yield _by("meterfall_dead_letters_open", "Open dead letters", ("reason",), status.dead_by_reason)
        if status.notices is not None:
            yield from _notices(status, status.notices)
        if totals is not None:
            yield from _totals(totals)


def _counted(sums: Sums) -> Iterator[Metric]:
    """Yield what the processes of this dyno counted: the metrics of worker/reports/counts.py."""
    parts: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, part), number in sums.items():
        parts[name][part] = number
    for metric in counts.COUNTED:
        found = parts[metric.name]
        if isinstance(metric, counts.Histogram):
            numbers = accumulate(found.get(str(bucket), 0) for bucket in range(len(metric.bounds) + 1))
            bounds = [*map(floatToGoString, metric.bounds), "+Inf"]
            histogram = HistogramMetricFamily(metric.name, metric.text)
            histogram.add_metric([], list(zip(bounds, numbers, strict=True)), found.get(counts.SUM, 0))
            yield histogram
        else:
            counter = CounterMetricFamily(metric.name, metric.text, labels=metric.label and [metric.label])
            for part, number in (dict.fromkeys(metric.known if metric.label else [""], 0) | found).items():
                counter.add_metric([part] if metric.label else [], number)
            yield counter


def _servers(status: Status) -> Iterator[Metric]:
    servers = {"redis": int(status.redis.answers), "postgres": int(status.postgres.answers)}
    if status.queue is not None:
        servers["queue"] = int(status.queue.answers)
    yield _by("meterfall_server_up", "1 if the server answers", ("server",), servers)
    severity = {"ok": 0, "degraded": 1, "down": 2}[status.severity]
    yield _gauge("meterfall_severity", "Verdict of the health check: 0 ok, 1 degraded, 2 down", severity)
    failed = Counter(one.check for one in status.findings)
    yield _by("meterfall_failed_checks", "Findings of the health check", ("check",), failed)
    emptied = status.emptied_at.timestamp() if status.emptied_at is not None else None
    yield _gauge("meterfall_redis_emptied_timestamp_seconds", "Time of its last loss, until acknowledged", emptied)
    yield _gauge("meterfall_redis_memory_used_bytes", "Memory that Redis uses", status.redis.used_memory_bytes)
    yield _gauge("meterfall_redis_memory_max_bytes", "Bound of its memory, 0: none", status.redis.maxmemory_bytes)
    policy = status.redis.maxmemory_policy
    may_evict = None if policy is None else int(policy != SAFE_POLICY)
    yield _gauge("meterfall_redis_may_evict", "1 if its eviction policy lets a full Redis throw keys away", may_evict)


def _partitions(status: Status) -> Iterator[Metric]:
    streams = {str(one.partition): one for one in status.partitions}
    for name, text, values in (
        ("lag", "Stream entries that wait", {name: one.lag for name, one in streams.items()}),
        ("oldest_age_seconds", "Age of the oldest", {name: one.oldest_age_ms / 1_000 for name, one in streams.items()}),
        ("halted", "1 if an error stopped it", {name: int(bool(one.halted)) for name, one in streams.items()}),
        ("paused", "1 if it is paused", {name: int(bool(one.paused)) for name, one in streams.items()}),
    ):
        yield _by(f"meterfall_partition_{name}", text, _PARTITION, values)
    stranded = sum((status.stranded or {}).values())
    yield _gauge("meterfall_stranded_entries", "Stream entries in streams that nobody drains", stranded)


def _dynos(status: Status) -> Iterator[Metric]:
    roles = {"supervisor": 0, "worker": 0, "proof": 0, "notices": 0} | Counter(
        str(one.role) for one in status.dynos or ()
    )
    yield _by("meterfall_processes", "Processes seen in the last 15 seconds", ("role",), roles)


def _proof(status: Status) -> Iterator[Metric]:
    proof = status.proof
    ended = proof.finished_at.timestamp() if proof is not None else None
    yield _gauge("meterfall_proof_finished_timestamp_seconds", "Time at which the last proof ended", ended)
    differences = proof.differences if proof is not None else None
    yield _gauge("meterfall_proof_differences", "Differences that it found", differences)


def _notices(status: Status, notices: NoticeBacklog) -> Iterator[Metric]:
    yield _gauge("meterfall_notices_waiting", "Notices that wait for a webhook", notices.waiting)
    yield _gauge("meterfall_notices_dead", "Notices given up, until they are replayed", notices.dead)
    age = (status.at - notices.oldest_at).total_seconds() if notices.oldest_at is not None else 0
    yield _gauge("meterfall_notices_oldest_age_seconds", "Age of the oldest that waits", max(0, age))


def _totals(totals: Mapping[keys.Stream, Totals]) -> Iterator[Metric]:
    streams = {str(stream.name): one for stream, one in totals.items()}
    # Before the first recount, the number of ids is not known.
    counted = {name: one for name, one in streams.items() if one.events is not None and one.holds is not None}
    for name, text, values in (
        ("pending_events", "Events that are pending", {name: one.events or 0 for name, one in counted.items()}),
        ("pending_holds", "Holds that are open", {name: one.holds or 0 for name, one in counted.items()}),
        ("lost_entries", "Stream entries lost, not dealt with", {name: one.all_lost for name, one in streams.items()}),
        ("stuck_events", "Pending ids without a stream entry", {name: one.stuck for name, one in streams.items()}),
    ):
        yield _by(f"meterfall_partition_{name}", text, _PARTITION, values)
    # Redis keeps these, so they go on over restarts of dynos, and begin anew if Redis was emptied.
    for name, text, found in (
        ("disposed", "Stream entries disposed of", {name: one.disposed for name, one in streams.items()}),
        ("ids_added", "Ids that became pending", {name: one.ids_added for name, one in streams.items()}),
        ("ids_left", "Ids that left pending", {name: one.ids_left for name, one in streams.items()}),
    ):
        counter = CounterMetricFamily(f"meterfall_partition_{name}", text, labels=_PARTITION)
        for partition, count in found.items():
            counter.add_metric([partition], count)
        yield counter


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    """Return a gauge, without a sample if its value is not known."""
    gauge = GaugeMetricFamily(name, text)
    if value is not None:
        gauge.add_metric([], value)
    return gauge


def _by(name: str, text: str, labels: tuple[str], values: Mapping[str, float]) -> GaugeMetricFamily:
    """Return a gauge with a sample for each value of its one label."""
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values.items():
        gauge.add_metric([label], value)
    return gauge
