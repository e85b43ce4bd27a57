"""The oracle of the fault tests and of the soak: what must hold after every fault, whatever went wrong in it.

Accepted ids are the ids of the usage log and of the dead letters together, none of them twice; what an account had at
first and the rows since are its balance, and what Redis shows; the streams are empty; what is pending are live holds.
Every difference is named. It believes no code that it judges: it reads the tables and the keys itself, and asks
`verify` besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from worker.keyspace import keys
from worker.keyspace.entries import owner_of
from worker.ledger.connection import batch_connection
from worker.ledger.proof import AMOUNT_ANSWERED
from worker.reports.proof import verify_ledger
from worker.resources import Resources

# The run with the duplicate check switched off looks for it: a test that fails by a time-out has seen nothing.
HEADING = "The oracle found differences:"

Identity = tuple[str, str]  # user id, event id

# Identity of a dead letter that names no event, such as one that is not JSON.
NOBODY: Identity = ("", "")

_MOVED_BUT_NOT_THERE = """
    WITH moved AS (
        SELECT user_id, meter, used_change AS used, rollover_change AS rollover, purchased_change AS purchased
        FROM ledger_entry WHERE meter <> ''
        UNION ALL
        SELECT user_id, meter, from_subscription, - from_rollover - overflow_to_debt, - from_purchased
        FROM usage_log WHERE seq IS NOT NULL
    ), summed AS (
        SELECT user_id, meter, sum(used)::bigint AS used, sum(rollover)::bigint AS rollover,
            sum(purchased)::bigint AS purchased
        FROM moved GROUP BY user_id, meter
    )
    SELECT user_id, meter, balance.used, balance.rollover, balance.purchased,
        summed.used, summed.rollover, summed.purchased
    FROM balance FULL JOIN summed USING (user_id, meter)
    WHERE (balance.used, balance.rollover, balance.purchased)
        IS DISTINCT FROM (summed.used, summed.rollover, summed.purchased)
    ORDER BY user_id, meter
"""


@dataclass
class Accepted:
    """What producers were promised: what Redis confirmed.

    `events` are to be recorded, with their amounts (after the multiplier). `dead` are the dead letters that there must
    be, by user, event id and reason: of entries that are no events (`NOBODY` where they name none), and of the second
    of two that share an id. `holds` are those still open, by user, meter and key, with what is left of them; one that
    counts against a sub-cap as well is named once more, by the name of that.
    `grants` are the requests that the sponsorship pool absorbed something of, `promises` those it still holds for.
    """

    events: dict[Identity, int] = field(default_factory=dict)
    dead: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    holds: dict[tuple[str, str, str], int] = field(default_factory=dict)
    grants: dict[str, int] = field(default_factory=dict)
    promises: dict[str, int] = field(default_factory=dict)


def prove(resources: Resources, accepted: Accepted) -> None:
    """Fail, naming every difference between what was accepted and what is there. Nothing may be under way."""
    found = differences(resources, accepted)
    assert not found, "\n  ".join([HEADING, *found])


def differences(resources: Resources, accepted: Accepted) -> list[str]:
    """Every difference between what was accepted and what is there."""
    return [
        *_compare_log(resources, accepted),
        *_compare_dead_letters(resources, accepted),
        *_compare_balances(resources),
        *_compare_cache(resources),
        *_find_backlogs(resources),
        *compare_held(resources, accepted),
        *_compare_grants(resources, accepted),
        *(f"verify: {found}" for found in verify_ledger(resources).differences),
    ]


def dead_letters(resources: Resources) -> Counter[tuple[str, str, str]]:
    """How many dead letters there are, by user, event id and reason."""
    found: Counter[tuple[str, str, str]] = Counter()
    for reason, payload in _rows(resources, "SELECT reason, payload FROM dead_letter WHERE state = 'open'"):
        owner = owner_of(payload)
        user_id, event_id = (owner[0], owner[2]) if owner else NOBODY
        found[user_id, event_id, reason] += 1
    return found


def _compare_log(resources: Resources, accepted: Accepted) -> Iterator[str]:
    logged = _rows(resources, f"SELECT user_id, event_id, {AMOUNT_ANSWERED} FROM usage_log")
    amounts = {(user_id, event_id): amount for user_id, event_id, amount in logged}
    for (user_id, event_id), times in Counter(row[:2] for row in logged).items():
        if times > 1:
            yield f"event {event_id} of {user_id}: recorded {times} times"
    for user_id, event_id in sorted(accepted.events.keys() - amounts.keys()):
        yield f"event {event_id} of {user_id}: accepted and not recorded"
    for user_id, event_id in sorted(amounts.keys() - accepted.events.keys()):
        yield f"event {event_id} of {user_id}: recorded and never accepted"
    for user_id, event_id in sorted(amounts.keys() & accepted.events.keys()):
        has, should = amounts[user_id, event_id], accepted.events[user_id, event_id]
        if has != should:
            yield f"event {event_id} of {user_id}: recorded with amount {has}, accepted with {should}"


def _compare_dead_letters(resources: Resources, accepted: Accepted) -> Iterator[str]:
    """A recorded event that is a dead letter as well was disposed of twice, unless the test expects just that."""
    found = dead_letters(resources)
    for user_id, event_id, reason in sorted(found.keys() | accepted.dead.keys()):
        has, should = found[user_id, event_id, reason], accepted.dead[user_id, event_id, reason]
        if has != should:
            what = f"event {event_id} of {user_id}" if user_id else "entry that names no event"
            yield f"{what}: {has} dead letters for {reason}, expected {should}"


def _compare_balances(resources: Resources) -> Iterator[str]:
    """Opening and sum of all rows against the balance: plain sums, no rules."""
    for user_id, meter, *numbers in _rows(resources, _MOVED_BUT_NOT_THERE):
        yield f"balance of {user_id} on {meter}: used, rollover, purchased {numbers[:3]}, its rows sum to {numbers[3:]}"


def _compare_cache(resources: Resources) -> Iterator[str]:
    """With nothing left to publish, a cached balance is at its account's version; `verify` looks at what it says."""
    for user_id, epoch, version in _rows(resources, "SELECT user_id, epoch, seq FROM account CROSS JOIN ledger"):
        cached: Any = resources.redis.get(keys.account_of(user_id, resources.settings.partitions).balance)
        head = " ".join(cached.decode().split("\n")[0].split(" ")[:2]) if cached else ""
        if head not in ("", f"{epoch} {version}"):
            yield f"cached balance of {user_id}: epoch and version {head}, the ledger is at {epoch} {version}"


def _find_backlogs(resources: Resources) -> Iterator[str]:
    for partition in keys.streams(resources.settings.partitions):
        if left := resources.redis.xlen(partition.entries):
            yield f"stream {partition.entries}: {left} entries left"


def compare_held(resources: Resources, accepted: Accepted) -> Iterator[str]:
    """Name every difference in what is held, for users and by the pool.

    An expired hold counts until the sweep has taken it out of its maps.
    """
    yield from _compare_pending(resources, accepted)
    yield from _compare_promises(resources, accepted)


def _compare_pending(resources: Resources, accepted: Accepted) -> Iterator[str]:
    """Pending maps whose total is not the sum of their ids, and ids that are not expected to be pending."""
    found: dict[tuple[str, str, str], int] = {}
    for raw_key in resources.redis.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        stored: Any = resources.redis.hgetall(raw_key)
        amounts = {name.decode(): int(amount) for name, amount in stored.items()}
        total = amounts.pop("total", 0)
        if total != sum(amounts.values()):
            yield f"pending of {user_id} on {meter}: total {total}, its ids sum to {sum(amounts.values())}"
        found |= {(user_id, meter, name): amount for name, amount in amounts.items()}
    expected = {(user_id, meter, f"h:{key}"): left for (user_id, meter, key), left in accepted.holds.items()}
    for user_id, meter, name in sorted(found.keys() | expected.keys()):
        has, should = found.get((user_id, meter, name), 0), expected.get((user_id, meter, name), 0)
        if has != should:
            yield f"pending of {user_id} on {meter}: {name} holds {has} units, expected {should}"


def _compare_grants(resources: Resources, accepted: Accepted) -> Iterator[str]:
    """What the pool gave, by request; `verify` sums it up and looks at each user's day."""
    given: Counter[str] = Counter()
    names = {sha256(request.encode()).digest(): request for request in accepted.grants}
    for digest, absorbed in _rows(resources, "SELECT request_hash, absorbed FROM sponsor_grant"):
        given[names.get(digest, digest.hex())] += absorbed
    for request in sorted(given.keys() | accepted.grants.keys()):
        if given[request] != accepted.grants.get(request, 0):
            should = accepted.grants.get(request, 0)
            yield f"request {request}: the pool gave {given[request]} units, accepted with {should}"


def _compare_promises(resources: Resources, accepted: Accepted) -> Iterator[str]:
    """What the pool promises, by request, and what of it counts in the windows of users."""
    stored: Any = resources.redis.hgetall(keys.SPONSORSHIP.promised)
    found = {name.decode(): int(units) for name, units in stored.items() if name != b"total"}
    expected = {f"h:{request}": units for request, units in accepted.promises.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name, 0) != expected.get(name, 0):
            yield f"pool: {name} is promised {found.get(name, 0)} units, expected {expected.get(name, 0)}"
    # A window that opened after a hold does not count it.
    for raw_key in resources.redis.scan_iter(match=keys.TODAY_PATTERN, count=1_000):
        counted: Any = resources.redis.hgetall(raw_key)
        for raw_name, units in sorted(counted.items()):
            name, user_id = raw_name.decode(), keys.user_of_today(raw_key.decode())
            if name.startswith("h:") and int(units) != expected.get(name, 0):
                yield f"window of {user_id}: {name} holds {int(units)} units, expected {expected.get(name, 0)}"


def _rows(resources: Resources, query: str) -> list[tuple[Any, ...]]:
    with batch_connection(resources.engine) as postgres:
        return postgres.execute(query).fetchall()
