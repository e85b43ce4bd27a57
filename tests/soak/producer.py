"""A producer of the soak: `python -m tests.soak.producer '<arguments as JSON>'`, one process with a few lanes.

A lane is a thread that does one piece of work after the other, at a rate that changes every few seconds. The seed, the
lane and the number of the work alone decide each work. A lane repeats every call until it has an answer, and notes all
in the journal, see tests/soak/journal.py. The successor of a killed producer gets the calls in doubt, and repeats
these first.

It reads words from its standard input, one per line: `pause` (answered by `paused` once no lane is in the middle of a
work) and `go`. The end of the input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from pathlib import Path
from random import Random
from threading import Condition, Thread
from typing import Any, TypeVar

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.exc import SQLAlchemyError

from config.catalogue import TRUST_TIERS, Catalogue
from config.settings import load_settings
from schemas.answers import EventAnswer, Serve, SponsorReason
from schemas.events import Refusal, UsageEvent, multiplied
from tests.soak.journal import Journal
from worker.admin import accounts, credits
from worker.client import Billing
from worker.demo.work import (
    Charged,
    Customer,
    Emitted,
    Held,
    Malformed,
    Work,
    largest_amount,
    make_customers,
    make_load,
)
from worker.errors import BadInput, HoldClosed, LedgerUnavailable, RedisUnavailable, UsageDenied
from worker.resources import Resources

PREFIX = "soak-"
# Works per second of one lane; another of these rates after each interval.
RATES = (2, 10, 40, 80)
RATE_SECONDS = 5.0
BURST_EVENTS = 400
# A forgotten hold expires before the next quiet point, which closes the kept ones.
SHORT_TTL_SECONDS = 2
LONG_TTL_SECONDS = 3_600
# Longer than any fault lasts: a call without an answer by then never gets one.
PATIENCE_SECONDS = 90.0
RETRY_SECONDS = 0.1

_UNANSWERED = (RedisUnavailable, LedgerUnavailable, redis.RedisError, psycopg.Error, SQLAlchemyError)
T = TypeVar("T")


def customers_of(catalogue: Catalogue, users: int) -> list[Customer]:
    """Return the users of a soak, on all plans in turns, the busiest first."""
    return make_customers(PREFIX, users, {code: list(plan.meters) for code, plan in catalogue.plans.items()})


def works(seed: int, lane: str, customers: Sequence[Customer]) -> Iterator[Work]:
    """Yield the works of a lane, without end."""
    return make_load(Random(f"{seed}/{lane}").getrandbits(32), sys.maxsize, customers, name=f"{lane}-")


class Gate:
    """A gate that holds the lanes back between two works in a pause, and at the end."""

    def __init__(self, lanes: int) -> None:
        self._changed = Condition()
        self._open = True
        self._over = False
        self._working = lanes

    def passed(self) -> bool:
        """Wait for the end of a pause; return False at the end of all work."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open or self._over)
            self._working += 1
            return not self._over

    def pause(self) -> None:
        """Return once no lane is in the middle of a work."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._working == 0)

    def go(self) -> None:
        """Let the lanes go on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def end(self) -> None:
        """Let the lanes end."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


@dataclass
class Lane:
    """One thread of a producer, and its tools."""

    name: str
    seed: int
    customers: Sequence[Customer]
    billing: Billing
    resources: Resources
    journal: Journal
    emitted: list[Emitted] = field(default_factory=list)

    # -- Asking until there is an answer ------------------------------------------------------------------------------

    def sure(self, what: str, call: Callable[[], T]) -> T:
        """Repeat a call until it has an answer. Raises the call's error if that takes too long."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call()
            except _UNANSWERED:
                if time.monotonic() > give_up_at:
                    raise
                self.journal.note("again", what)
                time.sleep(RETRY_SECONDS)

    def recorded(self, event: UsageEvent, call: Callable[[UsageEvent], EventAnswer], what: str) -> None:
        """Have an event recorded by some call, and note it."""
        identity = event.user_id, event.event_id
        self.journal.note("sending", *identity, event.meter, event.quantity, event.multiplier, event.hold_key)
        try:
            answer = self.sure(what, lambda: call(event))
        except UsageDenied as denied:
            self.journal.note("denied", *identity, denied.answer.reason.value)
        else:
            self.journal.note("confirmed", *identity, answer.amount)

    # -- Works --------------------------------------------------------------------------------------------------------

    def do(self, number: int, work: Work) -> None:
        """Do one work, and now and then some other call."""
        self.journal.note("began", self.name, number)
        random = Random(f"{self.seed}/{self.name}/{number}")
        match work:
            case Held():
                self._hold(work, random)
            case Emitted():
                self._emit(work, random)
            case Charged():
                self._charge(work.user_id, work.meter, work.event_id, work.amount)
            case Malformed():
                self._spoil(work.user_id, work.payload, work.reason)
        customer = random.choice(self.customers)
        beside = random.choices(
            (None, self._ask, self._operate, self._sponsor, self._burst, self._repeat),
            (70, 8, 6, 12, 0.6, 4),
        )[0]
        if beside is not None:
            beside(random, customer, f"{self.name}-b{number}")

    def _hold(self, work: Held, random: Random) -> None:
        user_id, meter, key = work.user_id, work.meter, work.key
        backend = random.choice(("gemini", "hardware", None)) if work.ending != "abandon" else None
        lasting = work.ending == "abandon" and random.random() < 0.5
        ttl = LONG_TTL_SECONDS if lasting else SHORT_TTL_SECONDS if work.ending == "abandon" else None
        billing = self.billing
        self.journal.note("holding", user_id, meter, key)
        try:
            self.sure("reserve", lambda: billing.reserve(user_id, meter, work.reserved, key, ttl, backend=backend))
        except UsageDenied as denied:
            # It may have been granted and the answer lost, and the balance used up meanwhile: close the key for good.
            self.sure("release", lambda: billing.release(user_id, meter, key))
            self.journal.note("ended", user_id, key)
            self.journal.note("did", f"denied: {denied.answer.reason.value}")
            return
        except HoldClosed:  # granted, the answer lost, and expired before the repeat
            self.journal.note("ended", user_id, key)
            return
        if work.ending == "abandon":
            self.journal.note(*(("kept", user_id, meter, key, work.reserved) if lasting else ("ended", user_id, key)))
            return
        for page, amount in enumerate(work.pages):
            self.recorded(
                self._event(user_id, f"{key}-p{page}", meter, amount),
                lambda event: billing.capture(
                    event.user_id, event.meter, key, event.event_id, event.quantity, backend=backend
                ),
                "capture",
            )
        if work.ending == "release":
            self.sure("release", lambda: billing.release(user_id, meter, key))
            self.journal.note("ended", user_id, key)
            return
        for _ in range(2 if random.random() < 0.05 else 1):
            self.recorded(
                self._event(user_id, key, meter, work.actual, hold_key=key),
                lambda event: billing.settle(event.user_id, event.meter, key, event.quantity, backend=backend),
                "settle",
            )

    def _event(
        self, user_id: str, event_id: str, meter: str, amount: int, *, hold_key: str | None = None
    ) -> UsageEvent:
        return UsageEvent(
            event_id=event_id, user_id=user_id, meter=meter, quantity=amount, multiplier="1", hold_key=hold_key
        )

    def _emit(self, work: Emitted, random: Random) -> None:
        """Emit by the client, or as any other program: a plain stream entry, without a mark or a ring."""
        multiplier = self.resources.catalogue.multiplier(work.model)
        event = UsageEvent(
            event_id=work.event_id, user_id=work.user_id, meter=work.meter, quantity=work.quantity,
            multiplier=multiplier, occurred_at=datetime.now(UTC),
        )  # fmt: skip
        raw = random.random() < 0.25
        for _ in range(work.times):
            if raw:
                self.recorded(event, self._append, "XADD")
            else:
                self.recorded(event, lambda each: self.billing.emit_events([each])[0], "emit")
        self.emitted = [*self.emitted[-50:], work]
        if random.random() < 0.01:
            other = event.model_copy(update={"quantity": work.quantity + 1})
            self._spoil(work.user_id, other.model_dump_json(exclude_none=True), Refusal.ID_CONFLICT)

    def _append(self, event: UsageEvent) -> EventAnswer:
        stream = self.billing.context.partition(event.user_id).entries
        self.billing.redis.xadd(stream, {"v": "1", "e": event.model_dump_json(exclude_none=True)})
        amount = multiplied(event.quantity, event.multiplier or "1")
        return EventAnswer(user_id=event.user_id, meter=event.meter, event_id=event.event_id, amount=amount)

    def _charge(self, user_id: str, meter: str, event_id: str, amount: int) -> bool:
        """Charge; return False if denied."""
        allowed = []

        def charge(_event: UsageEvent) -> EventAnswer:
            allowed.append(self.billing.charge(user_id, meter, amount, event_id))
            return allowed[0]

        self.recorded(self._event(user_id, event_id, meter, amount), charge, "charge")
        return bool(allowed)

    def _spoil(self, user_id: str, payload: str, reason: Refusal) -> None:
        """Append a stream entry that must become a dead letter."""
        stream = self.billing.context.partition(user_id).entries

        def spoil() -> None:
            # The client of Redis would repeat it by itself, and nobody would know how often.
            self.journal.note("spoiling", payload, reason.value)
            url, once = self.resources.settings.redis_url, Retry(NoBackoff(), 0)
            with closing(redis.Redis.from_url(url, retry=once, socket_timeout=5)) as client:
                client.xadd(stream, {"v": "1", "e": payload})

        self.sure("XADD", spoil)
        self.journal.note("spoilt", payload, reason.value)

    # -- Beside them --------------------------------------------------------------------------------------------------

    def _repeat(self, random: Random, _customer: Customer, _key: str) -> None:
        """An event that was sent a while ago, again: by a producer that forgot."""
        if self.emitted:
            self._emit(random.choice(self.emitted), random)

    def _burst(self, random: Random, _customer: Customer, key: str) -> None:
        """Many events of many users at once."""
        events = []
        for number in range(BURST_EVENTS):
            customer = random.choice(self.customers)
            event = self._event(customer.user_id, f"{key}-{number}", random.choice(customer.meters), 1)
            events.append(event)
            self.journal.note("sending", event.user_id, event.event_id, event.meter, 1, "1", None)
        for answer in self.sure("emit", lambda: self.billing.emit_events(events)):
            self.journal.note("confirmed", answer.user_id, answer.event_id, answer.amount)

    def _ask(self, random: Random, customer: Customer, _key: str) -> None:
        """Make calls that change nothing."""
        user_id, meter = customer.user_id, random.choice(customer.meters)
        what, call = random.choice(
            [
                ("check", lambda: self.billing.check(user_id, meter, 10)),
                ("remaining", lambda: self.billing.remaining(user_id, meter)),
                ("estimate", lambda: self.billing.estimate(user_id, meter, 10, model_slug="m2")),
            ]
        )
        self.sure(what, call)
        self.journal.note("did", what)

    def _operate(self, random: Random, customer: Customer, key: str) -> None:
        """Make a change of operators or shops. A refusal is no fault."""
        resources, user_id, meter = self.resources, customer.user_id, random.choice(customer.meters)
        spending = resources.catalogue.spills[meter]
        now = datetime.now(UTC)
        plans = [code for code, plan in resources.catalogue.plans.items() if meter in plan.meters]
        plan, trust = random.choice(plans), random.choice(TRUST_TIERS)
        event = random.choice(self.emitted).event_id if self.emitted else key
        owner = next((each.user_id for each in self.emitted if each.event_id == event), user_id)
        operations: Mapping[str, Callable[[], Any]] = {
            "claw back": lambda: credits.claw_back(resources, user_id, meter, largest_amount(meter), key),
            "reverse": lambda: credits.reverse(resources, owner, event),
            "change plan": lambda: accounts.change_plan(resources, user_id, plan),
            "change plan later": lambda: accounts.change_plan(resources, user_id, plan, at="period_end"),
            "trust": lambda: accounts.set_trust(resources, user_id, trust),
            "renew": lambda: accounts.renew(resources, user_id, key, now, now + timedelta(days=30)),
            "past due": lambda: accounts.set_status(resources, user_id, "past_due"),
            "activate": lambda: accounts.set_status(resources, user_id, "active"),
        }
        if spending and random.random() < 0.4:
            self.grant(user_id, meter, key, 10 * largest_amount(meter))
            return
        what = random.choice(list(operations))
        try:
            self.sure(what, operations[what])
        except BadInput:
            what = f"refused: {what}"
        self.journal.note("did", what)

    def grant(self, user_id: str, meter: str, key: str, amount: int) -> None:
        """Sell units."""
        self.journal.note("granting", user_id, meter, key, amount)
        self.sure("grant", lambda: credits.grant(self.resources, user_id, meter, amount, key))
        self.journal.note("granted", user_id, meter, key)

    def _sponsor(self, random: Random, customer: Customer, key: str) -> None:
        """Make a request to the pool."""
        user_id, request_id, billing = customer.user_id, f"{key}-ask", self.billing
        wanted = random.choice((5, 20, 60, 300))
        actual = wanted * random.randint(0, 120) // 100
        ending = random.choices(("settle", "release", "expire", "keep"), (80, 10, 8, 2))[0]
        ttl = {"keep": LONG_TTL_SECONDS, "expire": SHORT_TTL_SECONDS}.get(ending)
        self.journal.note("asking", user_id, request_id, actual)
        try:
            answer = self.sure("decide", lambda: billing.decide(user_id, wanted, request_id, ttl_seconds=ttl))
        except HoldClosed:  # as for a hold
            self._served(user_id, request_id, "expired")
            return
        if answer.reason is SponsorReason.POOL_UNAVAILABLE:
            # The pool may hold although the answer was lost.
            self.sure("release", lambda: billing.release_sponsored(user_id, request_id, "no answer"))
            self._served(user_id, request_id, "turned away")
            return
        paid = 0
        if answer.charge:
            if not self._charge(user_id, random.choice(customer.meters), f"{key}-pay", answer.charge):
                self._served(user_id, request_id, "turned away")
                return
            paid = answer.charge
        if answer.serve is Serve.PARTIAL:
            try:
                answer = self.sure(
                    "confirm",
                    lambda: billing.confirm_partial(user_id, wanted, request_id, paid=paid, ttl_seconds=ttl),
                )
            except HoldClosed:  # as for a hold
                self._served(user_id, request_id, "expired")
                return
        if answer.expires_at is None:
            self.pay(request_id, paid)
        elif ending == "settle":
            self.settle_sponsored(user_id, request_id, actual)
        elif ending == "release":
            self.sure("release", lambda: billing.release_sponsored(user_id, request_id, "cancelled"))
            self._served(user_id, request_id, "released")
        else:
            ended = "left open" if ending == "keep" else "expired"
            self._served(user_id, request_id, ended, held=answer.absorb)

    def settle_sponsored(self, user_id: str, request_id: str, actual: int) -> None:
        """Settle the pool's hold of a request, if there is one."""
        try:
            done = self.sure("settle", lambda: self.billing.settle_sponsored(user_id, request_id, actual))
        except HoldClosed:
            # A delayed decision must not revive it.
            self.sure("release", lambda: self.billing.release_sponsored(user_id, request_id, "never answered"))
            self._served(user_id, request_id, "turned away")
        else:
            self._served(user_id, request_id, "settled", done.held, done.absorbed, done.paid, done.credited)

    def pay(self, request_id: str, paid: int) -> None:
        """Let a share of a payment flow into the pool."""
        self.journal.note("paying", request_id, paid)
        credit = self.sure("credit", lambda: self.billing.credit_pool(request_id, paid))
        self._served("", request_id, "paid", 0, 0, paid, credit.credited)

    def _served(
        self, user_id: str, request_id: str, ended: str, held: int = 0, absorbed: int = 0, paid: int = 0, back: int = 0
    ) -> None:
        self.journal.note("served", user_id, request_id, "", "", ended, 0, held, absorbed, paid, back)

    # -- After a killed producer --------------------------------------------------------------------------------------

    def make_sure(self, doubts: Mapping[str, Sequence[Any]]) -> None:
        """Repeat the calls in doubt, and release holds in doubt."""
        for user_id, event_id, meter, quantity, multiplier, hold_key in doubts["events"]:
            event = UsageEvent(
                event_id=event_id, user_id=user_id, meter=meter, quantity=quantity, multiplier=multiplier,
                hold_key=hold_key,
            )  # fmt: skip
            self.recorded(event, lambda each: self.billing.emit_events([each])[0], "emit")
        settled = {hold_key for *_, hold_key in doubts["events"]}
        for user_id, meter, key in doubts["holds"]:
            if key not in settled:
                self.give_back(user_id, meter, key)
        paid = dict(doubts["payments"])
        for request_id, units in paid.items():
            self.pay(request_id, units)
        for user_id, request_id, actual in doubts["requests"]:
            if request_id not in paid:
                self.settle_sponsored(user_id, request_id, actual)
        for user_id, meter, key, amount in doubts["grants"]:
            self.grant(user_id, meter, key, amount)

    def give_back(self, user_id: str, meter: str, key: str) -> None:
        """Release a hold in any state."""
        self.sure("release", lambda: self.billing.release(user_id, meter, key))
        self.journal.note("ended", user_id, key)


def rate_at(seed: int, lane: str, seconds: float) -> float:
    """Return the works per second of a lane, `seconds` after the start of the soak."""
    return Random(f"{seed}/{lane}/rate {int(seconds / RATE_SECONDS)}").choice(RATES)


def run_lane(lane: Lane, gate: Gate, began: float, first: int) -> None:
    """Do one work after the other, from the number `first` on. An error ends the whole producer."""
    try:
        for number, work in zip(count(first), islice(works(lane.seed, lane.name, lane.customers), first, None)):
            if not gate.passed():
                return
            started = time.time()
            lane.do(number, work)
            rate = rate_at(lane.seed, lane.name, started - began)
            time.sleep(max(0.0, started + 1 / rate - time.time()))
    except BaseException:  # noqa: BLE001 - a lane that ends silently would look like an idle one
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def main() -> None:
    """Work until the end of the standard input."""
    arguments = json.loads(sys.argv[1])
    settings = load_settings(os.environ)
    journal = Journal(Path(arguments["journal"]))
    with Billing.connect(settings) as billing, closing(Resources.open(settings)) as resources:
        customers = customers_of(resources.catalogue, arguments["users"])
        lanes = [Lane(name, arguments["seed"], customers, billing, resources, journal) for name in arguments["lanes"]]
        lanes[0].make_sure(json.loads(sys.stdin.readline()))
        print("ready", flush=True)
        gate = Gate(len(lanes))
        for lane in lanes:
            first = arguments["lanes"][lane.name]
            Thread(target=run_lane, args=(lane, gate, arguments["began"], first), daemon=True).start()
        for word in sys.stdin:
            if word == "pause\n":
                gate.pause()
                print("paused", flush=True)
            else:
                gate.go()
        gate.pause()
        gate.end()


if __name__ == "__main__":
    main()
