"""Shared by `demo` and `replay`: servers, workers of their own, accounts, waiting, and the proof at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from config.log import configure_logging
from config.settings import load_settings, naming_servers, variable_name
from schemas.answers import EventAnswer
from worker.admin import accounts
from worker.demo.servers import Servers, running_servers
from worker.demo.work import Customer
from worker.errors import UsageDenied
from worker.keyspace import keys
from worker.ledger.accounts import count_accounts, existing_accounts
from worker.ledger.connection import batch_connection
from worker.ledger.dead_letters import count_dead_letters
from worker.ledger.migrate import migrate
from worker.ledger.proof import recorded_amounts
from worker.ledger.reports import ClosedPeriod, PlanUsage, usage_by_plan
from worker.process import on_launcher_death
from worker.reports.proof import verify_ledger
from worker.reports.status import backlogs
from worker.resources import Resources

_OPEN_CHUNK_ACCOUNTS = 500
_POLL_SECONDS = 0.02
# Longer than a worker needs to start, and than Postgres needs to notice that one was killed.
_STALL_SECONDS = 30.0
_STOP_SPARE_SECONDS = 5.0

Identity = tuple[str, str]  # user id, event id (or hold key)
Workers = Sequence[subprocess.Popen[bytes]]


class RehearsalError(RuntimeError):
    """A demo or a replay could not finish; the message names the obstacle. Nothing is lost by it."""


class Sponsored(NamedTuple):
    """A request to the sponsorship pool, and the answers to its client.

    `served` and `reason` are the decision, `ended` is the end. Units: the pool `held` for it and `absorbed`, the caller
    `paid`, and the pool got `credited`.
    """

    user_id: str | None
    request_id: str
    served: str
    reason: str
    ended: str
    estimate: int
    held: int = 0
    absorbed: int = 0
    paid: int = 0
    credited: int = 0


class CreditStep(NamedTuple):
    """A step of the act about credits, as the books have it: `units` of a `meter`, `credits` of its wallet.

    `says` names the credit that paid, or the limit that denied.
    """

    what: str
    meter: str | None
    units: int | None
    credits: int
    says: str


class Told(NamedTuple):
    """A notice, and how often a receiver took it with a right signature; None if none was asked to."""

    kind: str
    at: datetime
    says: str
    delivered: int | None


class Report(NamedTuple):
    """The result of a rehearsal: numbers by name, usage by plan and meter, and every fault.

    It also shows periods that closed, requests that were sponsored, how credit was spent, and what was told of that.
    """

    numbers: dict[str, object]
    usage: list[PlanUsage]
    faults: list[str]
    closed: Sequence[ClosedPeriod] = ()
    sponsored: Sequence[Sponsored] = ()
    spent: Sequence[CreditStep] = ()
    told: Sequence[Told] = ()


@dataclass(frozen=True)
class Stage:
    """The servers, resources and progress bars of a rehearsal. `lasting`: the servers are not ours, so the accounts
    stay.
    """

    servers: Servers
    resources: Resources
    bars: Progress
    lasting: bool


@dataclass
class Tally:
    """The work of a producer. `accepted` maps each confirmed event to its amount; `repeated` counts events sent
    again.
    """

    accepted: dict[Identity, int] = field(default_factory=dict)
    repeated: int = 0
    denied: Counter[str] = field(default_factory=Counter)
    malformed: Counter[str] = field(default_factory=Counter)
    left_open: set[Identity] = field(default_factory=set)

    def take(self, answer: EventAnswer) -> None:
        """Note an event that Redis has confirmed."""
        identity = answer.user_id, answer.event_id
        self.repeated += answer.repeated or identity in self.accepted
        self.accepted[identity] = answer.amount

    def deny(self, denied: UsageDenied) -> None:
        """Note a check that said no."""
        self.denied[denied.answer.reason.value] += 1

    def add(self, other: Tally) -> None:
        """Add the tally of another producer."""
        self.accepted |= other.accepted
        self.repeated += other.repeated
        self.denied += other.denied
        self.malformed += other.malformed
        self.left_open |= other.left_open


@contextmanager
def stage(environ: Mapping[str, str]) -> Iterator[Stage]:
    """Open servers, a migrated ledger and resources for the length of the block.

    `environ` may name servers; else the stage starts its own. SIGTERM and SIGHUP end the block as Ctrl-C does, so that
    no process stays.
    """
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        servers = stack.enter_context(running_servers(environ))
        lasting = bool(environ.get("DATABASE_URL") and environ.get("REDIS_URL"))
        named: dict[str, object] = {"database_url": servers.database_url, "redis_url": servers.redis_url}
        # To servers of our own no webhook leads but that of the demo, to a receiver on this machine.
        own: dict[str, object] = {"webhook_private_addresses": True, "queue_redis_url": None}
        settings = load_settings(environ, **named, **({} if lasting else own))
        configure_logging(settings.log_level, settings.log_format)
        migrate(servers.database_url)
        resources = stack.enter_context(closing(Resources.open(settings)))
        resources.claim()
        yield Stage(servers, resources, stack.enter_context(_progress_bars()), lasting)


@contextmanager
def own_workers(resources: Resources, count: int) -> Iterator[Workers]:
    """Run `count` workers for the length of the block.

    Each is a `meterfall worker run`. SIGTERM stops them after their batches.
    """
    settings = resources.settings
    environ = naming_servers(os.environ, settings.database_url or "", settings.redis_url)
    environ[variable_name("queue_redis_url")] = settings.queue_redis_url or ""
    environ[variable_name("log_level")] = "WARNING"
    environ[variable_name("webhook_private_addresses")] = str(settings.webhook_private_addresses).lower()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            worker = subprocess.Popen(
                [sys.executable, "-m", "worker", "worker", "run"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environ,
                preexec_fn=on_launcher_death(signal.SIGTERM),
            )
            workers.append(worker)
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            try:
                worker.wait(settings.stop_timeout_seconds + _STOP_SPARE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def open_missing(on: Stage, customers: Sequence[Customer]) -> None:
    """Open an account for every customer without one."""
    bar = on.bars.add_task("accounts", total=len(customers))
    by_plan: dict[str, list[str]] = {}
    for customer in customers:
        by_plan.setdefault(customer.plan, []).append(customer.user_id)
    for plan, users in by_plan.items():
        for start in range(0, len(users), _OPEN_CHUNK_ACCOUNTS):
            chunk = users[start : start + _OPEN_CHUNK_ACCOUNTS]
            with batch_connection(on.resources.engine) as postgres:
                known = existing_accounts(postgres, chunk)
            if missing := [user_id for user_id in chunk if user_id not in known]:
                accounts.open_many(on.resources, missing, plan)
            on.bars.advance(bar, len(chunk))


def wait_until_drained(on: Stage, workers: Workers) -> None:
    """Return once every stream is empty.

    `workers` are our own, if any; one of them must stay alive meanwhile.
    Raises RehearsalError if all of them ended, or if no stream entry was disposed of for a while.
    """
    left = total = _backlog(on.resources)
    bar = on.bars.add_task("drain", total=total)
    moved_at = time.monotonic()
    while left:
        if workers and all(worker.poll() is not None for worker in workers):
            raise RehearsalError(f"all workers ended, with {workers[0].returncode}, while {left} events were waiting")
        if time.monotonic() > moved_at + _STALL_SECONDS:
            raise RehearsalError(
                f"{left} events are waiting and none was taken for {_STALL_SECONDS:.0f} s: "
                "is a `meterfall worker run` running? `meterfall status` shows halted partitions"
            )
        time.sleep(_POLL_SECONDS)
        before, left = left, _backlog(on.resources)
        if left < before:
            moved_at = time.monotonic()
            on.bars.update(bar, completed=max(0, total - left))


def prove(on: Stage, prefix: str, tally: Tally) -> tuple[dict[str, object], list[PlanUsage], list[str]]:
    """Compare the producers' answers with the books, and prove all balances.

    It takes the users with this `prefix`.
    Returns numbers, usage by plan and every difference: an accepted event that is not recorded, or not with its amount;
    an event that no producer sent; dead letters other than the malformed stream entries; pending units beside live
    holds.
    """
    with batch_connection(on.resources.engine) as postgres:
        recorded = recorded_amounts(postgres, prefix)
        usage = usage_by_plan(postgres, prefix)
        dead = count_dead_letters(postgres, prefix)
        total = count_accounts(postgres)
    open_holds, open_events = _pending(on.resources, prefix)
    bar = on.bars.add_task("verify", total=total)
    report = verify_ledger(on.resources, lambda done: on.bars.update(bar, completed=done))
    faults = [
        *named_faults("accepted but not recorded", tally.accepted.keys() - recorded.keys()),
        *named_faults("recorded but never sent", recorded.keys() - tally.accepted.keys()),
        *named_faults(
            "recorded with another amount",
            {one for one, amount in tally.accepted.items() if recorded.get(one, amount) != amount},
        ),
        *named_faults("recorded and still pending", open_events),
        *named_faults("hold neither closed nor left open", open_holds - tally.left_open),
        *named_faults("hold left open but not pending", tally.left_open - open_holds),
        *report.differences,
    ]
    if dead != dict(tally.malformed):
        faults.append(f"dead letters are {dead}, malformed stream entries were {dict(tally.malformed)}")
    numbers: dict[str, object] = {
        "accepted": len(tally.accepted),
        "recorded": len(recorded),
        "repeated": tally.repeated,
        "denied": dict(tally.denied),
        "dead_letters": dead,
        "open_holds": len(open_holds),
        "verified_accounts": report.accounts,
        "verified_changes": report.changes,
        "verify": "clean" if not report.differences else f"{len(report.differences)} differences",
    }
    return numbers, usage, faults


def named_faults(what: str, found: set[Identity]) -> list[str]:
    """Return one line about the findings, with an example; none without findings."""
    if not found:
        return []
    user_id, name = min(found)
    return [f"{len(found)} × {what}, such as {name} of {user_id}"]


def _backlog(resources: Resources) -> int:
    return sum(backlogs(resources.redis, resources.settings.partitions).values())


def _pending(resources: Resources, prefix: str) -> tuple[set[Identity], set[Identity]]:
    """Return the pending holds and events of users with this prefix, by Redis."""
    holds: set[Identity] = set()
    events: set[Identity] = set()
    for raw_key in resources.redis.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        user_id, _ = keys.owner_of_pending(raw_key.decode())
        if not user_id.startswith(prefix):
            continue
        for raw_name in cast("list[bytes]", resources.redis.hkeys(raw_key)):
            kind, _, name = raw_name.decode().partition(":")
            if kind != "total":
                (holds if kind == "h" else events).add((user_id, name))
    return holds, events


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """Show bars on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
