"""The demo's act about the sponsorship pool: callers of all trust tiers ask for help at the same time.

Each caller sends a few requests, one after the other. The service treats the answers as a real one does: it settles
free requests, takes part of the pay for partial ones, and takes full pay for the others or turns them away. It releases
some holds and forgets some. It charges payments to the caller's own allowance. Then the proof compares the answers to
the clients with the books of the pool.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from config.catalogue import Catalogue
from schemas.answers import Serve
from worker.admin import accounts
from worker.client import AsyncBilling
from worker.demo.stage import Identity, Sponsored, Stage, Tally, named_faults
from worker.errors import UsageDenied
from worker.keyspace.connection import redis_now_ms
from worker.keyspace.keys import SPONSORSHIP
from worker.ledger import sponsorship
from worker.ledger.connection import batch_connection, begin_snapshot
from worker.rules.sponsorship import CreditRow, GrantRow, Pool, hash_of

# The shortest life that a hold may have, and a little more than that.
_SHORT_TTL_SECONDS = 1
_PAST_SHORT_TTL_SECONDS = 1.05
# The pool must still promise the open holds when the proof looks.
_LONG_TTL_SECONDS = 3_600

Ending = Literal["settled", "settled late", "released", "expired", "left open"]
_CREDITED = ("settled", "settled late", "paid")


class Request(NamedTuple):
    """Work with an estimate of `estimate` units and a cost of `actual`. `ending`: the fate of its hold, if it has
    one.
    """

    estimate: int
    actual: int
    ending: Ending = "settled"


# By caller: the trust tier, and the requests in their order. Small, as a lasting pool pays for them at every demo.
_CALLERS: dict[str, tuple[str | None, tuple[Request, ...]]] = {
    "anonymous": (None, (Request(20, 20),)),
    "newcomer": ("new", (Request(100, 100),)),
    "member": ("established", (Request(40, 30), Request(30, 30), Request(10, 10))),
    "regular": ("trusted", (Request(120, 0, "released"), Request(60, 70), Request(50, 50, "left open"))),
    "patron": ("elite", (Request(300, 300, "expired"), Request(100, 80, "settled late"))),
}


class Purse(NamedTuple):
    """The plan of the callers, and the meter that their payments charge."""

    plan: str
    meter: str


class Served(NamedTuple):
    """The answers to the clients: `requests`, and the events by which callers paid. `before`: the pool before that."""

    before: Pool
    requests: list[Sponsored]
    tally: Tally


def serve_callers(on: Stage, prefix: str) -> Served:
    """Open the callers' accounts, trust them, and serve their requests.

    Takes little more than a second.
    """
    purse = _purse(on.resources.catalogue)
    tiers = {f"{prefix}{name}": tier for name, (tier, _) in _CALLERS.items() if tier is not None}
    accounts.open_many(on.resources, list(tiers), purse.plan)
    for user_id, tier in tiers.items():
        accounts.set_trust(on.resources, user_id, tier)
    with batch_connection(on.resources.engine) as postgres:
        before = sponsorship.read_pool(postgres)
        if before is None:  # the first batch opens it
            before = Pool(on.resources.catalogue.sponsorship.initial, 0, sponsorship.read_epoch(postgres))
    tally = Tally()
    return Served(before, asyncio.run(_serve_all(on, prefix, purse, tally)), tally)


def prove_sponsored(on: Stage, prefix: str, served: Served) -> tuple[dict[str, object], list[str]]:
    """Compare the answers to the clients with the pool's books and open promises.

    Every stream must be drained. On servers that are not ours, others may use the pool meanwhile: the proof allows for
    their grants and credits.
    Returns numbers and every difference.
    """
    with batch_connection(on.resources.engine) as postgres:
        begin_snapshot(postgres)
        pool = sponsorship.read_pool(postgres) or served.before
        rows = list(sponsorship.read_journal(postgres, served.before.seq))
    requests = {_identity(one.request_id): one for one in served.requests}
    settled = {identity: one.absorbed for identity, one in requests.items() if one.ended.startswith("settled")}
    paid = {identity: one.credited for identity, one in requests.items() if one.paid and one.ended in _CREDITED}
    left_open = {identity: one.held for identity, one in requests.items() if one.ended == "left open"}
    names = {hash_of(request_id): (caller, request_id) for caller, request_id in requests}
    granted, credited, others = {}, {}, 0
    for row in rows:
        identity = names.get(row.request_hash)
        if isinstance(row, GrantRow) and (identity or row.user_id.startswith(prefix)):
            granted[identity or (row.user_id, row.request_hash.hex())] = row.absorbed
        elif isinstance(row, CreditRow) and identity:
            credited[identity] = row.credited
        else:
            others += row.credited if isinstance(row, CreditRow) else -row.absorbed
    held, unapplied = _promised(on, prefix)
    faults = [
        *_compared("settled", settled, "granted by the pool", granted),
        *_compared("paid", paid, "credited to the pool", credited),
        *_compared("left open", left_open, "promised by the pool", held),
        *named_faults("granted and still promised", unapplied),
    ]
    expected = served.before.units + sum(paid.values()) - sum(settled.values()) + (others if on.lasting else 0)
    if pool.units != expected:
        faults.append(f"the pool has {pool.units} units, the answers to the clients make it {expected}")
    numbers: dict[str, object] = {
        "pool_served": dict(Counter(one.served for one in served.requests)),
        "pool_absorbed": sum(granted.values()),
        "pool_credited": sum(credited.values()),
        "pool_promised": sum(held.values()),
    }
    return numbers, faults


# Serving -------------------------------------------------------------------------------------------------------------


async def _serve_all(on: Stage, prefix: str, purse: Purse, tally: Tally) -> list[Sponsored]:
    async with AsyncBilling.connect(on.resources.settings) as billing:
        service = _Service(billing, purse, tally)
        served = await asyncio.gather(*(service.serve_caller(prefix, name) for name in _CALLERS))
    return [one for requests in served for one in requests]


@dataclass(frozen=True)
class _Service:
    """A service that asks the pool before it works."""

    billing: AsyncBilling
    purse: Purse
    tally: Tally

    async def serve_caller(self, prefix: str, name: str) -> list[Sponsored]:
        """Serve all requests of one caller."""
        tier, requests = _CALLERS[name]
        user_id = None if tier is None else f"{prefix}{name}"
        return [
            await self._serve(user_id, f"{prefix}{name}-{number}", request)
            for number, request in enumerate(requests, start=1)
        ]

    async def _serve(self, user_id: str | None, request_id: str, request: Request) -> Sponsored:
        """Serve one request as the pool allows; repeat every settlement and credit."""
        estimate = request.estimate
        ttl_seconds = _SHORT_TTL_SECONDS if request.ending in ("expired", "settled late") else _LONG_TTL_SECONDS
        answer = await self.billing.decide(user_id, estimate, request_id, ttl_seconds=ttl_seconds)
        outcome = Sponsored(user_id, request_id, answer.serve.value, answer.reason.value, "turned away", estimate)
        if user_id is None:
            return outcome
        if answer.charge:
            if not await self._take_payment(user_id, request_id, answer.charge):
                return outcome
            outcome = outcome._replace(paid=answer.charge)
        if answer.serve is Serve.PARTIAL:
            answer = await self.billing.confirm_partial(
                user_id, estimate, request_id, paid=outcome.paid, ttl_seconds=ttl_seconds
            )
        if answer.expires_at is None:
            for _ in range(2):
                credit = await self.billing.credit_pool(request_id, outcome.paid)
            return outcome._replace(ended="paid", credited=credit.credited)
        outcome = outcome._replace(ended=request.ending, held=answer.absorb)
        if request.ending == "released":
            await self.billing.release_sponsored(user_id, request_id, "cancelled")
        elif request.ending.startswith("settled"):
            if request.ending == "settled late":
                await asyncio.sleep(_PAST_SHORT_TTL_SECONDS)
            for _ in range(2):
                settlement = await self.billing.settle_sponsored(user_id, request_id, request.actual)
            outcome = outcome._replace(absorbed=settlement.absorbed, credited=settlement.credited)
        return outcome

    async def _take_payment(self, user_id: str, request_id: str, units: int) -> bool:
        """Charge the rest to the caller; False if the allowance is too small."""
        try:
            paid = await self.billing.charge(user_id, self.purse.meter, units, f"{request_id}-pay", source="demo")
        except UsageDenied as denied:
            self.tally.deny(denied)
            return False
        self.tally.take(paid)
        return True


def _purse(catalogue: Catalogue) -> Purse:
    """Return a plan with credits for the callers, else the first plan's first meter."""
    purses = [Purse(code, meter) for code, plan in catalogue.plans.items() if plan.active for meter in plan.meters]
    return min(purses, key=lambda purse: catalogue.meters[purse.meter].unit != "credits")


# Proving -------------------------------------------------------------------------------------------------------------


def _promised(on: Stage, prefix: str) -> tuple[dict[Identity, int], set[Identity]]:
    """Return the pool's promises for this prefix: units by hold, settled requests.

    The settled requests are not applied yet. A due hold is no promise any more, whether or not a script has dropped it
    yet.
    """
    held: dict[Identity, int] = {}
    unapplied: set[Identity] = set()
    redis = on.resources.redis
    promised = cast("dict[bytes, bytes]", redis.hgetall(SPONSORSHIP.promised))
    due = set(redis.zrangebyscore(SPONSORSHIP.holds, "-inf", redis_now_ms(redis)))
    for raw_name, units in promised.items():
        kind, _, request_id = raw_name.decode().partition(":")
        if not request_id.startswith(prefix) or request_id.encode() in due:
            continue
        if kind == "h":
            held[_identity(request_id)] = int(units)
        else:
            unapplied.add(_identity(request_id))
    return held, unapplied


def _compared(claim_as: str, claims: dict[Identity, int], found_as: str, found: dict[Identity, int]) -> list[str]:
    """Name the identities that only one side has, and those with other amounts."""
    differing = {one for one, units in claims.items() if found.get(one, units) != units}
    return [
        *named_faults(f"{claim_as} but not {found_as}", claims.keys() - found.keys()),
        *named_faults(f"{found_as} but never {claim_as}", found.keys() - claims.keys()),
        *named_faults(f"{found_as} with another amount", differing),
    ]


def _identity(request_id: str) -> Identity:
    """Return caller and request: a request's id begins with its caller's."""
    return request_id.rpartition("-")[0], request_id
