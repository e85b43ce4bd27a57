"""Any sequence of calls, drains, deaths and losses, done to the system and to the model alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from typing import Any, ClassVar

import pytest
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from config.settings import Settings
from tests.reports.proof_sponsorship.model import BUDGETS, Model, Refusal, TrustChanged
from tests.support.books import assert_proved
from tests.support.ledger import rows
from tests.support.processes import killed_in
from tests.support.resources import worker_resources
from tests.support.sponsorship import (
    drain_pool,
    expire,
    let_a_day_pass,
    members,
    open_pool,
    past_the_triggers,
    pool_row,
    promised,
    sweep,
    today_of,
)
from tests.support.waiting import wait_until
from worker.admin import accounts, erasure
from worker.client import Billing
from worker.errors import AccountError, HoldClosed
from worker.keyspace import keys
from worker.resources import Resources

INITIAL = 500
CRASH_POINTS = ["after_read", "inside_transaction", "after_commit", "after_publish"]


class Trust:
    """A host that knows some users better than their accounts do."""

    def __init__(self) -> None:
        self.says: dict[str, str | None] = {}

    def tier_of(self, user_id: str) -> str | None:
        """What it says."""
        return self.says.get(user_id)


USERS = ["ada", "bob", "cy"]
# Every step of a machine is a round trip: to make a failing example shorter would take longer than a test may.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
units = st.integers(0, 40) | st.integers(0, 450) | st.sampled_from([0, 1, 7, 50, 120, 400, 500, 10**12])
estimates = units | st.sampled_from([-1, -(10**12)])
payments = st.integers(0, 30) | st.integers(0, 500) | st.sampled_from([0, 9, 10, 19, 10**12])


@dataclass
class System:
    """Real servers, a worker's resources, and a client with a host that knows some users, and one without."""

    settings: Settings
    resources: Resources
    redis: Redis
    plain: Billing
    hosted: Billing
    trust: Trust


class PoolMachine(RuleBasedStateMachine):
    """What can happen to the pool, done to the system and to the model alike."""

    system: ClassVar[System]
    runs: ClassVar[Iterator[int]] = count()

    def __init__(self) -> None:
        super().__init__()
        run = next(self.runs)
        self.users = [f"{user}-{run}" for user in USERS]
        self.names = (f"request-{number}" for number in count())
        self.known: list[str] = []
        system = self.system
        system.redis.flushdb()
        system.plain.context.claimed = system.hosted.context.claimed = False
        system.trust.says.clear()
        with past_the_triggers(system.settings) as postgres:
            for table in ("sponsor_grant", "sponsor_credit", "dead_letter"):
                postgres.execute(f"DELETE FROM {table}")
        open_pool(system.settings, INITIAL)
        accounts.open_many(system.resources, self.users, "tenant")
        self.model = Model(INITIAL, self.users)

    @initialize(tiers=st.lists(st.sampled_from(sorted(BUDGETS)), min_size=len(USERS), max_size=len(USERS)))
    def trust_them(self, tiers: list[str]) -> None:
        for user, tier in zip(self.users, tiers, strict=True):
            self.set_trust(user, tier)
        self.drain()

    # -- Asking both, and comparing

    def client(self, hosted: bool) -> Billing:
        return self.system.hosted if hosted else self.system.plain

    def host(self, user: str, hosted: bool) -> str | None:
        return self.system.trust.says.get(user) if hosted else None

    def fresh(self) -> str:
        self.known.append(next(self.names))
        return self.known[-1]

    def agree(self, call: Callable[[], Any], expected: Callable[[], dict[str, Any]]) -> Any:
        """The call answers what the model says, or raises it."""
        try:
            wanted: dict[str, Any] | Refusal = expected()
        except Refusal as refusal:
            wanted = refusal
        if isinstance(wanted, Refusal):
            with pytest.raises(wanted.error) as raised:
                call()
            if isinstance(raised.value, HoldClosed):
                assert raised.value.state == wanted.state
            return None
        answer = call()
        found = answer.model_dump()
        if "holds" in wanted:
            found["holds"] = found.pop("expires_at") is not None
        assert found == wanted
        return answer

    def decide(self, user: str | None, estimate: int, name: str, hosted: bool) -> Any:
        return self.agree(
            lambda: self.client(hosted).decide(user, estimate, name),
            lambda: self.model.ask("all", user, estimate, name, host=self.host(user or "", hosted)),
        )

    def confirm(self, user: str | None, estimate: int, name: str, paid: int, hosted: bool) -> Any:
        return self.agree(
            lambda: self.client(hosted).confirm_partial(user, estimate, name, paid=paid),
            lambda: self.model.ask("most", user, estimate, name, paid, self.host(user or "", hosted)),
        )

    def settle(self, user: str, name: str, actual: int, paid: int | None, hosted: bool) -> Any:
        return self.agree(
            lambda: self.client(hosted).settle_sponsored(user, name, actual, paid=paid),
            lambda: self.model.settle(user, name, actual, paid, self.host(user, hosted)),
        )

    def release(self, user: str, name: str) -> Any:
        return self.agree(
            lambda: self.system.plain.release_sponsored(user, name, "no work"), lambda: self.model.release(user, name)
        )

    # -- Requests

    @rule(data=st.data(), estimate=estimates, hosted=st.booleans())
    def a_request_is_decided(self, data: st.DataObject, estimate: int, hosted: bool) -> None:
        user = data.draw(st.sampled_from([*self.users, *self.users, None]))
        self.decide(user, estimate, self.fresh(), hosted)

    @rule(data=st.data(), estimate=estimates, paid=payments, hosted=st.booleans())
    def a_part_is_confirmed_without_a_decision(
        self, data: st.DataObject, estimate: int, paid: int, hosted: bool
    ) -> None:
        user = data.draw(st.sampled_from([*self.users, *self.users, None]))
        self.confirm(user, estimate, self.fresh(), paid, hosted)

    @rule(data=st.data(), estimate=units, hosted=st.booleans(), between=st.booleans())
    def the_advice_is_taken(self, data: st.DataObject, estimate: int, hosted: bool, between: bool) -> None:
        """Decide, pay the rest, confirm; perhaps another request comes in between."""
        user, name = data.draw(st.sampled_from(self.users)), self.fresh()
        advice = self.decide(user, estimate, name, hosted)
        if between:
            self.decide(data.draw(st.sampled_from(self.users)), data.draw(units), self.fresh(), hosted)
        if advice.serve == "partial":
            self.confirm(user, estimate, name, advice.charge, hosted)

    @rule(data=st.data(), estimate=units, actual=units, hosted=st.booleans())
    def a_request_is_decided_and_settled(self, data: st.DataObject, estimate: int, actual: int, hosted: bool) -> None:
        user, name = data.draw(st.sampled_from(self.users)), self.fresh()
        self.decide(user, estimate, name, hosted)
        self.settle(user, name, actual, None, hosted)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), other=st.sampled_from(["", "", "user", "estimate", "paid", "call"]), hosted=st.booleans())
    def a_name_is_used_again(self, data: st.DataObject, other: str, hosted: bool) -> None:
        """For the same, or for something that differs in one way."""
        name = data.draw(st.sampled_from(self.known))
        found = self.model.requests.get(name)
        user, estimate, paid = data.draw(st.sampled_from(self.users)), data.draw(estimates), data.draw(payments)
        whole = data.draw(st.booleans())
        if found:
            user = user if other == "user" else found.user
            estimate = estimate if other == "estimate" else found.estimate
            paid = paid if other == "paid" else found.paid
            whole = (found.mode == "all") != (other == "call")
        if whole:
            self.decide(user, estimate, name, hosted)
        else:
            self.confirm(user, estimate, name, paid, hosted)

    def owner(self, data: st.DataObject, name: str) -> str:
        """The user of a request, and now and then somebody else."""
        found = self.model.requests.get(name)
        others = st.sampled_from(self.users)
        return found.user if found and data.draw(st.integers(0, 9)) else data.draw(others)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data(), actual=units, paid=st.none() | payments, hosted=st.booleans())
    def a_request_is_settled(self, data: st.DataObject, actual: int, paid: int | None, hosted: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.requests)))
        self.settle(self.owner(data, name), name, actual, paid, hosted)

    @precondition(lambda self: "held" in {one.state for one in self.model.requests.values()})
    @rule(data=st.data(), less=st.integers(0, 20), paid=st.none() | st.integers(0, 20), hosted=st.booleans())
    def what_is_held_is_settled(self, data: st.DataObject, less: int, paid: int | None, hosted: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.held())))
        found = self.model.requests[name]
        self.settle(found.user, name, max(0, found.estimate - less), paid, hosted)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def a_request_is_released(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.known, self.fresh()]))
        self.release(self.owner(data, name), name)

    @rule(data=st.data(), actual=units)
    def what_nobody_decided_is_settled(self, data: st.DataObject, actual: int) -> None:
        self.settle(data.draw(st.sampled_from(self.users)), self.fresh(), actual, None, False)

    @rule(data=st.data(), paid=payments, hosted=st.booleans())
    def something_is_paid_for(self, data: st.DataObject, paid: int, hosted: bool) -> None:
        name = data.draw(st.sampled_from([*self.known, self.fresh()]))
        paid = self.model.credited.get(name, paid) if data.draw(st.booleans()) else paid
        self.agree(lambda: self.client(hosted).credit_pool(name, paid), lambda: self.model.credit(name, paid))

    @rule(data=st.data(), quantity=units, hosted=st.booleans())
    def somebody_asks_what_it_would_cost(self, data: st.DataObject, quantity: int, hosted: bool) -> None:
        user = data.draw(st.sampled_from(self.users))
        expected = self.model.ask("advise", user, quantity, "", host=self.host(user, hosted))
        answer = self.client(hosted).estimate(user, "credits", quantity)
        assert answer.sponsorship.model_dump() == expected

    # -- Trust

    def set_trust(self, user: str, tier: str) -> None:
        if user in self.model.closed:
            with pytest.raises(AccountError, match="closed"):
                accounts.set_trust(self.system.resources, user, tier)
            return
        change = accounts.set_trust(self.system.resources, user, tier)
        assert change.repeated == (self.model.tiers[user] == tier)
        if not change.repeated:
            self.model.tiers[user] = tier
            self.model.stream.append(TrustChanged(user))

    @rule(data=st.data(), tier=st.sampled_from(sorted(BUDGETS)), at_once=st.booleans())
    def trust_changes(self, data: st.DataObject, tier: str, at_once: bool) -> None:
        self.set_trust(data.draw(st.sampled_from(self.users)), tier)
        if at_once:
            self.drain()

    @rule(data=st.data(), tier=st.none() | st.sampled_from([*sorted(BUDGETS), "friend", ""]))
    def the_host_changes_its_mind(self, data: st.DataObject, tier: str | None) -> None:
        self.system.trust.says[data.draw(st.sampled_from(self.users))] = tier

    @precondition(lambda self: len(self.model.closed) < len(USERS) - 1)
    @rule(data=st.data(), really=st.integers(0, 3))
    def an_account_is_closed(self, data: st.DataObject, really: int) -> None:
        if really == 0:
            user = data.draw(st.sampled_from(sorted(set(self.users) - self.model.closed)))
            erasure.close_account(self.system.resources, user)
            self.model.close(user)

    # -- Time, and what is lost

    @precondition(lambda self: self.model.held())
    @rule(data=st.data(), swept=st.booleans())
    def a_hold_expires(self, data: st.DataObject, swept: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.held())))
        expire(self.system.redis, self.model.requests[name].user, name)
        self.model.expire(name)
        if swept:
            sweep(self.system.resources)
            assert f"h:{name}" not in promised(self.system.redis)

    @rule()
    def a_day_passes(self) -> None:
        self.drain()
        let_a_day_pass(self.system.settings, self.system.redis, *self.users)
        self.model.let_a_day_pass()

    @rule(data=st.data())
    def caches_are_lost(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(self.users))
        self.system.redis.delete(keys.SPONSORSHIP.pool, keys.SPONSORSHIP.standing(user))
        self.model.shown = None
        self.model.shown_tier.pop(user, None)

    @rule(really=st.integers(0, 3))
    def redis_loses_everything(self, really: int) -> None:
        if really == 0:
            self.system.redis.flushdb()
            self.model.forget()

    # -- Workers

    @rule()
    def drain(self) -> None:
        assert drain_pool(self.system.resources) == len(self.model.stream)
        self.model.commit()
        self.model.publish()

    # The third in a row would have a part of the stream in hand, and another part committed while it dies.
    @precondition(lambda self: self.model.stream and self.model.deaths < 2)
    @rule(label=st.sampled_from(CRASH_POINTS))
    def a_worker_is_killed(self, label: str) -> None:
        killed_in(self.system.settings, drain_pool, label)
        if label in ("after_commit", "after_publish"):
            self.model.commit()
        deaths = self.model.deaths
        if label == "after_publish":
            self.model.publish()
        self.model.deaths = deaths + 1
        wait_until(lambda: not self.system.redis.exists(keys.SPONSORSHIP.busy), "the dead one counts as dead")

    # -- What must hold

    @invariant()
    def no_more_is_promised_than_there_is(self) -> None:
        redis, model = self.system.redis, self.model
        found = promised(redis)
        expired = {f"h:{name}" for name, one in model.requests.items() if one.state == "expired"}
        expected = {f"h:{name}": held for name, held in model.held().items()}
        expected |= {f"g:{name}": absorbed for name, absorbed in model.settled.items()}
        assert {name: held for name, held in found.items() if name not in expired} == expected
        ((balance,),) = rows(self.system.settings, "SELECT balance FROM sponsor_pool")
        assert balance == model.balance >= 0
        due = sum(held for name, held in expected.items() if name[:2] == "h:" or name[2:] not in model.granted)
        assert due <= balance
        assert redis.xlen(keys.SPONSORSHIP.entries) == len(model.stream)

    @rule()
    def all_is_quiet(self) -> None:
        """Nothing is under way: everything is proved."""
        self.drain()
        sweep(self.system.resources)
        redis, model, settings = self.system.redis, self.model, self.system.settings
        assert_proved(self.system.resources)
        assert pool_row(settings) == (INITIAL, model.balance, model.seq)
        assert promised(redis) == {f"h:{name}": held for name, held in model.held().items()}
        assert members(redis, keys.SPONSORSHIP.holds) == model.held().keys()
        for user in self.users:
            if (window := model.windows.get(user)) and window.open and redis.exists(keys.SPONSORSHIP.today(user)):
                mine = {
                    f"h:{name}": one.held
                    for name, one in model.requests.items()
                    if one.window is window and one.state == "held"
                }
                assert today_of(redis, user) == {"absorbed": window.absorbed, **mine}
        self.books_agree()

    def books_agree(self) -> None:
        """Row for row."""
        settings, model = self.system.settings, self.model
        found = {
            row[0]: row[1:]
            for row in rows(
                settings,
                "SELECT request_hash, held, actual, paid, absorbed, tier, daily_budget, late FROM sponsor_grant",
            )
        }
        assert found == {
            sha256(one.request.encode()).digest(): (
                one.held, one.actual, one.paid, one.absorbed, one.tier, one.budget, one.late)
            for one in model.granted.values()
        }  # fmt: skip
        names = Counter(user for (user,) in rows(settings, "SELECT user_id FROM sponsor_grant"))
        open_ones = Counter(one.user for one in model.granted.values() if one.user not in model.closed)
        assert {user: n for user, n in names.items() if not str(user).startswith("closed:")} == open_ones
        days = rows(settings, "SELECT sum(absorbed)::bigint FROM sponsor_grant GROUP BY user_id, window_start")
        by_window: Counter[int] = Counter()
        for one in model.granted.values():
            by_window[one.window.number] += one.absorbed
        assert sorted(day for (day,) in days) == sorted(by_window.values())  # type: ignore[type-var]
        paid = {row[0]: row[1:] for row in rows(settings, "SELECT request_hash, paid, credited FROM sponsor_credit")}
        assert paid == {sha256(name.encode()).digest(): (given, given // 10) for name, given in model.credited.items()}
        assert rows(settings, "SELECT count(*) FROM dead_letter") == [(model.refused,)]

    def teardown(self) -> None:
        self.all_is_quiet()


def live(settings: Settings, examples: int, steps: int) -> None:
    """Let machines run on these servers."""
    trust = Trust()
    with (
        worker_resources(settings) as resources,
        Redis.from_url(settings.redis_url) as redis,
        Billing.connect(settings) as plain,
        Billing.connect(settings, trust=trust) as hosted,
    ):
        system = System(settings, resources, redis, plain, hosted, trust)
        machine = type("Machine", (PoolMachine,), {"system": system})
        chosen = hypothesis_settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True, phases=PHASES
        )
        run_state_machine_as_test(machine, settings=chosen)


def test_any_sequence_of_calls_drains_deaths_and_losses(settings: Settings) -> None:
    live(settings, examples=12, steps=30)
