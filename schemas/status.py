"""The state of the whole system at one moment, as `status --json` and `health --json` print it. None: not known now.

Ages are in milliseconds, amounts in whole units, times in UTC.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict

from schemas.answers import Answer

Severity = Literal["ok", "degraded", "down"]


class Finding(Answer):
    """One failed check: its name, how bad it is, what is wrong, and the remedy."""

    check: str
    severity: Literal["degraded", "down"]
    text: str
    remedy: str


class PartitionStatus(Answer):
    """One partition, or the `sponsor` pool.

    The oldest stream entry has waited `oldest_age_ms`. `pending` counts holds and events not applied yet. `per_second`
    is the rate of the last 10 to 15 seconds. `refused` counts dead letters of the last ten minutes by reason, None
    while Postgres is away. `halted` and `paused` are reasons, empty if it is neither. The last id of the stream is
    `ahead_ms` ahead of the clock, if a producer makes ids of its own.
    """

    partition: int | str
    lag: int
    oldest_age_ms: int
    pending: int
    per_second: float
    in_hand: bool
    refused: dict[str, int] | None
    halted: str
    paused: str
    ahead_ms: int


class RedisStatus(Answer):
    """Redis: the `error` if it does not answer. `dangers` to what it keeps, one sentence each."""

    answers: bool
    error: str | None = None
    version: str | None = None
    used_memory_bytes: int | None = None
    maxmemory_bytes: int | None = None
    maxmemory_policy: str | None = None
    has_append_only_file: bool | None = None
    dangers: tuple[str, ...] = ()


class QueueStatus(Answer):
    """The Redis that the RQ queue has for itself: the `error` if it does not answer."""

    answers: bool
    error: str | None = None


class PostgresStatus(Answer):
    """Postgres: the `error` if it does not answer. `revision` of its tables, and the one that this release `wants`."""

    answers: bool
    error: str | None = None
    revision: str | None = None
    wants_revision: str


class Difference(Answer):
    """One difference that a proof found: what was `expected` by the changes, and what was `found`."""

    user_id: str | None
    meter: str | None
    kind: str
    expected: str | None
    found: str | None
    text: str


class ProofStatus(Answer):
    """The last proof that ended, with its first differences. `differences` counts all of them.

    It proved `from_zero` accounts from their first change on, and the others from their checkpoint.
    """

    finished_at: datetime
    accounts: int
    from_zero: int
    from_checkpoint: int
    changes: int
    pending_maps: int
    differences: int
    first: tuple[Difference, ...]


class Dyno(Answer):
    """The last heartbeat of one process: a supervisor, or a worker, proof or notice process of `parent_pid`.

    `revision` of the tables is the one that its release wants, `catalogue` the digest of the file that it carries. It
    has been `doing` this `since` then. Times are those of Redis.
    """

    # A newer release may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    pid: int
    parent_pid: int
    role: Literal["supervisor", "worker", "proof", "notices"]
    release: str
    revision: str
    catalogue: str
    doing: str
    since: datetime
    started_at: datetime
    seen_at: datetime


class RedisLoss(Answer):
    """A loss of the data of Redis that nobody has acknowledged yet.

    A process noticed it `at` this moment: Redis was `empty`, an `older` copy, or had data `unknown` to the ledger.
    """

    at: datetime
    found: Literal["empty", "older", "unknown"]


class UncollectedWork(Answer):
    """Events on a meter that no account paid, and their units."""

    meter: str
    events: int
    amount: int


class NoticeBacklog(Answer):
    """Notices on their way to `webhooks`: those that wait, the oldest since `oldest_at`; those given up, `dead`."""

    webhooks: int
    waiting: int
    dead: int
    oldest_at: datetime | None


class Status(Answer):
    """The whole system at one moment.

    Without Redis, `partitions` is empty and everything about streams is None; without Postgres, everything about
    accounts and dead letters is None.

    `is_led`: a supervisor sweeps, so at least one dyno lives. `dynos` are the processes seen in the last 15 s.
    `seconds_to_empty` is the time that the backlog takes at the rate of now. `stranded` counts the stream entries
    beyond the number of partitions: a producer with an old number sent them, and no worker drains them. `lost` counts
    stream entries by partition that no script of ours disposed of. `spooled` items wait on this machine's disk, the
    oldest for `spooled_oldest_age_ms`. `redis_losses` are the moments at which Redis had lost its data, the last one
    first, until an operator acknowledges them; None without Postgres. The holds that were open then are gone, and so
    are the events that were not applied yet. `emptied_at` is the last of them. `late_repeats` counts the events that
    came again within a day after their outcome was forgotten. `uncollected` is the work of the last day that no
    account paid: the last 10,000 events by meter; None without Postgres. The oldest boundary that no job has stored is
    due since `renewal_due_at`. `missing_default_plan` is the default plan of the settings here, if the catalogue in
    force lacks it. `notices` are those on their way to webhooks; None without Postgres. `queue` is the Redis of the RQ
    queue if that has one for itself.
    """

    at: datetime
    severity: Severity
    findings: tuple[Finding, ...]
    redis: RedisStatus
    postgres: PostgresStatus
    queue: QueueStatus | None = None
    partitions: tuple[PartitionStatus, ...]
    lag: int | None
    oldest_age_ms: int | None
    pending: int | None
    per_second: float | None
    seconds_to_empty: float | None
    is_led: bool | None
    dynos: tuple[Dyno, ...] | None
    accounts: int | None
    dead_letters: int | None
    dead_by_reason: dict[str, int] | None
    waiting_jobs: int | None
    stranded: dict[int, int] | None
    lost: dict[str, int] | None
    spooled: int
    spooled_oldest_age_ms: int
    emptied_at: datetime | None
    redis_losses: tuple[RedisLoss, ...] | None
    late_repeats: int | None
    uncollected: tuple[UncollectedWork, ...] | None
    renewal_due_at: datetime | None
    proof: ProofStatus | None
    notices: NoticeBacklog | None = None
    catalogue: str
    missing_default_plan: str | None = None


class Health(Answer):
    """The outcome of all checks; `findings` are the failed ones, the worst first."""

    at: datetime
    severity: Severity
    findings: tuple[Finding, ...]


class ProofReport(Answer):
    """The scope of a proof, and every difference it found.

    It proved `from_zero` accounts from their first change on, and the others from their checkpoint.
    """

    accounts: int
    from_zero: int
    from_checkpoint: int
    changes: int
    pending_maps: int
    differences: tuple[Difference, ...]
