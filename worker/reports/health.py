"""What is wrong with the system, as pure checks of its status: the first line of `status`, and `health`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from schemas.status import Dyno, Finding, NoticeBacklog, PartitionStatus, Severity, Status
from worker.rules.catalogues import ADD_DEFAULT_PLAN, missing_default_plan
from worker.rules.lives import text_of
from worker.rules.words import counted

_SECONDS_MS = 1_000
# A proof may take long, and its job waits for others: only a second one that is missing tells.
_PROOF_INTERVALS = 2
_RENEWAL_INTERVALS = 5
# A worker process has its first heartbeat within this time.
_START_SECONDS = 15
# A receiver may be away for a while: it is tried again.
_NOTICE_SECONDS = 900
_DEGRADED, _DOWN = "degraded", "down"


class Limits(NamedTuple):
    """The limits of the checks. Intervals of 0 switch a periodic job off, and with it its check."""

    max_lag_seconds: int
    verify_interval_seconds: int
    renew_interval_seconds: int


def findings(status: Status, limits: Limits) -> list[Finding]:
    """Return the failed checks, the worst first. What is not known now fails no check but that of its server."""
    found = [
        *_servers(status),
        *_work(status, limits),
        *_streams(status),
        *_ledger(status, limits),
    ]
    return sorted(found, key=lambda finding: finding.severity != _DOWN)


def severity_of(found: Iterable[Finding]) -> Severity:
    """Return the worst severity among these findings, `ok` without any."""
    severities = {finding.severity for finding in found}
    return "down" if _DOWN in severities else "degraded" if severities else "ok"


def _down(check: str, text: str, remedy: str) -> Finding:
    return Finding(check=check, severity="down", text=text, remedy=remedy)


def _degraded(check: str, text: str, remedy: str) -> Finding:
    return Finding(check=check, severity="degraded", text=text, remedy=remedy)


def _servers(status: Status) -> Iterator[Finding]:
    redis, postgres = status.redis, status.postgres
    if not redis.answers:
        yield _down("redis", str(redis.error), "start it, or mend REDIS_URL")
    if not postgres.answers:
        yield _down("postgres", str(postgres.error), "start it, or mend DATABASE_URL")
    if status.queue is not None and not status.queue.answers:
        remedy = "start it, or mend METERFALL_QUEUE_REDIS_URL; the supervisors drain by themselves meanwhile"
        yield _degraded("queue", str(status.queue.error), remedy)
    # Newer tables fit: they come before the dynos that need them.
    if postgres.revision is not None and postgres.revision < postgres.wants_revision:
        text = f"the tables are {postgres.revision}, this release wants {postgres.wants_revision}"
        yield _down("revision", text, "`meterfall migrate`, or start the other release")
    for danger in redis.dangers:
        yield _degraded("redis_setup", danger, "see *Run it* in README.md: a Redis of its own")
    for loss in status.redis_losses or ():
        remedy = "send the events of that time again, see docs/runbook.md; then `meterfall cache acknowledge`"
        yield _degraded("redis_emptied", text_of(loss.at, loss.found), remedy)


def _work(status: Status, limits: Limits) -> Iterator[Finding]:
    if status.is_led is False:
        yield _down("workers", "nobody drains: no dyno is alive", "start a dyno: `meterfall worker run`")
    idle = without_workers(status)
    if idle:
        names = ", ".join(f"{one.host} pid {one.pid}" for one in idle[:3])
        text = f"{len(idle)} of {len(supervisors(status))} dynos have no live worker process: {names}"
        yield _degraded("workers", text, "see the log of that dyno; restart it")
    if status.missing_default_plan is not None:
        yield _degraded("default_plan", missing_default_plan(status.missing_default_plan), ADD_DEFAULT_PLAN)
    late = [one for one in status.partitions if one.oldest_age_ms > limits.max_lag_seconds * _SECONDS_MS]
    if late:
        oldest = max(one.oldest_age_ms for one in late) // _SECONDS_MS
        text = f"{_named(late)} late: events wait for {oldest:,} s, the limit is {limits.max_lag_seconds:,} s"
        yield _degraded("lag", text, "start more dynos; see *A partition is stuck* in docs/runbook.md")


def supervisors(status: Status) -> list[Dyno]:
    """Return the dynos that live: their supervisors."""
    return [one for one in status.dynos or () if one.role == "supervisor"]


def worker_processes(status: Status) -> list[Dyno]:
    """Return the worker processes that live."""
    return [one for one in status.dynos or () if one.role == "worker"]


def without_workers(status: Status) -> list[Dyno]:
    """Return the supervisors that have no live worker process, though they had the time to start one."""
    led = {(one.host, one.parent_pid) for one in worker_processes(status)}
    return [
        one
        for one in supervisors(status)
        if (one.host, one.pid) not in led and (one.seen_at - one.started_at).total_seconds() > _START_SECONDS
    ]


def _streams(status: Status) -> Iterator[Finding]:
    for reason, group in _grouped(status.partitions, "halted"):
        text = f"{_named(group)} halted: {reason[:200]}"
        yield _degraded("halted", text, "see *A partition is stuck* in docs/runbook.md")
    for reason, group in _grouped(status.partitions, "paused"):
        remedy = f"mend the producer, then `meterfall partition resume {group[0].partition}`"
        yield _degraded("paused", f"{_named(group)} paused {reason}", remedy)
    if status.stranded:
        total = sum(status.stranded.values())
        streams = ranges(sorted(status.stranded))
        events = counted(total, "event")
        text = f"{events} in stream {streams}, which nobody drains: a producer has another METERFALL_PARTITIONS"
        yield _degraded("stranded", text, f"mend it there, then `meterfall partition move {min(status.stranded)}`")
    if status.lost:
        text = f"{counted(sum(status.lost.values()), 'stream entry')} lost: trimmed, deleted or evicted"
        yield _degraded("lost", text, "`meterfall verify` names what is pending for ever")
    ahead = [one for one in status.partitions if one.ahead_ms]
    if ahead:
        days = max(one.ahead_ms for one in ahead) / 86_400_000
        text = f"{_named(ahead)} {days:,.1f} days ahead of the clock: a producer makes entry ids of its own"
        yield _degraded("ahead", text, "have it write * as the id; the stream begins anew once it is empty")


def _ledger(status: Status, limits: Limits) -> Iterator[Finding]:
    recent: dict[str, int] = defaultdict(int)
    for one in status.partitions:
        for reason, count in (one.refused or {}).items():
            recent[reason] += count
    if recent:
        most = sorted(recent.items(), key=lambda each: -each[1])[:3]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in most)
        text = f"{counted(sum(recent.values()), 'dead letter')} in the last ten minutes: {reasons}"
        yield _degraded("dead_letters", text, "`meterfall dead list` shows them")
    proof = status.proof
    if proof is not None and proof.differences:
        text = f"the last proof found {counted(proof.differences, 'difference')}, first: {proof.first[0].text[:120]}"
        yield _degraded("proof", text, "`meterfall verify` names each")
    longest = _PROOF_INTERVALS * limits.verify_interval_seconds
    if longest and proof is not None and _seconds(status, proof.finished_at) > longest:
        text = f"the last proof ended {_seconds(status, proof.finished_at):,} s ago"
        yield _degraded("proof_age", text, "`meterfall verify`; see why the job does not end")
    if status.notices is not None:
        yield from _notices(status, status.notices)
    if limits.renew_interval_seconds and status.renewal_due_at is not None and not status.lag:
        late = _seconds(status, status.renewal_due_at)
        if late > max(60, _RENEWAL_INTERVALS * limits.renew_interval_seconds):
            text = f"periods that ended {late:,} s ago are not stored"
            yield _degraded("renewals", text, "see the log of the workers for renew_due")


def _notices(status: Status, notices: NoticeBacklog) -> Iterator[Finding]:
    if notices.dead:
        text = f"{counted(notices.dead, 'notice')} given up: a webhook failed too often"
        yield _degraded("notices_dead", text, "`meterfall notices list --dead`, then `meterfall notices replay`")
    late = _seconds(status, notices.oldest_at) if notices.oldest_at is not None else 0
    if late > _NOTICE_SECONDS:
        text = f"{counted(notices.waiting, 'notice')} wait for webhooks, the oldest for {late:,} s"
        yield _degraded(
            "notices_late", text, "`meterfall webhooks test`; see that a dyno sends and the receiver answers"
        )


def _seconds(status: Status, since: datetime) -> int:
    return int((status.at - since).total_seconds())


def _grouped(partitions: Sequence[PartitionStatus], field: str) -> list[tuple[str, list[PartitionStatus]]]:
    """Return the partitions by their reason in `field`, without those that have none."""
    groups: dict[str, list[PartitionStatus]] = defaultdict(list)
    for one in partitions:
        if reason := getattr(one, field):
            groups[reason].append(one)
    return list(groups.items())


def _named(partitions: Sequence[PartitionStatus]) -> str:
    """Return the names of partitions with a verb: `partition 3 is`, `partitions 0–7, sponsor are`."""
    numbers = ranges(sorted(one.partition for one in partitions if isinstance(one.partition, int)))
    others = [one.partition for one in partitions if isinstance(one.partition, str)]
    names = ", ".join([*([numbers] if numbers else []), *others])
    return f"partition {names} is" if len(partitions) == 1 else f"partitions {names} are"


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with their runs joined: `0–7, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
