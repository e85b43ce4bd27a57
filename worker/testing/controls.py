"""What a test does to the world of its fake, and what it reads there."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from config.catalogue import TRUST_TIERS
from schemas.answers import Parts, PayFrom
from schemas.events import UsageEvent
from worker.errors import AccountError, NotFound
from worker.keyspace import keys
from worker.reports.holds import OpenHold, open_holds
from worker.rules import lifecycle
from worker.rules.account import Account, Balance, Change
from worker.rules.limits import PERS, Limits, Per, Window, bounds
from worker.rules.received import Refused
from worker.rules.sponsorship import LOWEST_TIER
from worker.rules.wallets import draws_of
from worker.rules.waterfall import STATUSES
from worker.testing.world import World

# Units by meter. A number counts for each meter of the plan; purchased units and rollover for those that spill.
Units = int | Mapping[str, int]


class Controls:
    """The calls of a fake that are no calls of the client. They block; none of them waits for anything."""

    world: World

    # -----------------------------------------------------------------------------------------------------------------
    # Accounts

    def open(
        self,
        user_id: str,
        plan: str,
        *,
        status: str = "active",
        trust: str = LOWEST_TIER,
        used: Units = 0,
        rollover: Units = 0,
        purchased: Units = 0,
    ) -> Account:
        """Open an account whose first period begins now, and return it.

        `used`, `rollover` (below zero: debt) and `purchased` are units by meter, or one number for each meter of the
        plan that takes them. Raises AccountError for an account that exists, a status, a trust tier or a meter that
        does not; CatalogueError for an unknown plan.
        """
        world = self.world
        with world.redis.in_reach():
            if user_id in world.ledger.accounts:
                raise AccountError(f"user_id: {user_id} has an account already")
            _require("status", status, STATUSES)
            _require("trust", trust, TRUST_TIERS)
            account = lifecycle.open_account(world.catalogue, user_id, plan, status, world.redis.now())
            balances = dict(account.balances)
            drawing = draws_of(world.catalogue, account.plan, account.status)
            for meter in purchased if isinstance(purchased, Mapping) else ():
                self._require_no_wallet(account, meter, "grant")
            for bucket, units in (("used", used), ("rollover", rollover), ("purchased", purchased)):
                for meter, amount in _by_meter(units, bucket, balances, drawing).items():
                    balances[meter] = _with_units(balances[meter], bucket, amount)
            account = world.ledger.open(account._replace(trust=trust, balances=balances))
            world.refresh(user_id)
            return account

    def set_balance(
        self,
        user_id: str,
        meter: str,
        *,
        used: int | None = None,
        rollover: int | None = None,
        purchased: int | None = None,
    ) -> Balance:
        """Put units into buckets of a meter, in place of those that are there; None leaves a bucket alone.

        Raises AccountError for an unknown account or meter, for units that no such bucket has, and for purchased units
        of a meter that draws on a wallet.
        """
        units = {"used": used, "rollover": rollover, "purchased": purchased}

        def with_units(account: Account, _: list[Change]) -> Account:
            account = lifecycle.with_plan_meters(self.world.catalogue, account, self.world.redis.now())
            if purchased:
                self._require_no_wallet(account, meter, "grant")
            _require("meter", meter, account.balances)
            balance = account.balances[meter]
            for bucket, amount in units.items():
                if amount is not None:
                    balance = _with_units(balance, bucket, amount)
            return account._replace(balances={**account.balances, meter: balance})

        with self.world.redis.in_reach():
            account = self.world.ledger.change(user_id, with_units)
            self.world.refresh(user_id)
        return account.balances[meter]

    def set_status(self, user_id: str, status: str) -> Account:
        """Give an account another status now. Raises AccountError for an unknown account or status."""
        _require("status", status, STATUSES)
        now = self.world.redis.now()
        with self.world.redis.in_reach():
            account = self.world.ledger.change(
                user_id,
                lambda account, steps: lifecycle.change_status(self.world.catalogue, account, status, now, steps),
            )
            self.world.refresh(user_id)
        return account

    def change_plan(self, user_id: str, plan: str) -> Account:
        """Put an account on another plan now. Raises AccountError for an unknown account, CatalogueError."""
        self.world.catalogue.plan(plan)
        with self.world.redis.in_reach():
            account = self.world.ledger.change_plan(user_id, plan)
            self.world.refresh(user_id)
        return account

    def set_limit(
        self, user_id: str, meter: str, per: Per, amount: int | None, *, of: Literal["operator", "user"] = "operator"
    ) -> Balance:
        """Limit what an account spends of a meter per day, week or month; None takes the limit away.

        Raises AccountError for an unknown account, meter or window, and for an amount out of range.
        """
        _require("per", per, dict.fromkeys(PERS))
        if amount is not None and amount < 1:
            raise AccountError(f"amount: at least 1 (got {amount})")
        world, now = self.world, self.world.redis.now()

        def with_limit(account: Account, _: list[Change]) -> Account:
            account = lifecycle.with_plan_meters(world.catalogue, account, now)
            if amount is not None:
                self._require_no_wallet(account, meter, "limit")
            _require("meter", meter, account.balances)
            balance = account.balances[meter]
            limits = (balance.limits or Limits()).with_amount(of, per, amount)
            if limits is not None and per in limits.pers and per not in limits.windows:
                starts, ends = bounds(per, now, lifecycle.timezone_of(world.catalogue, account))
                window = Window(starts, ends, *world.ledger.spent_since(user_id, meter, starts))
                limits = limits._replace(windows={**limits.windows, per: window})
            return account._replace(balances={**account.balances, meter: balance._replace(limits=limits)})

        with world.redis.in_reach():
            account = world.ledger.change(user_id, with_limit)
            world.refresh(user_id)
        return account.balances[meter]

    def set_pay_from(self, user_id: str, pay_from: PayFrom | None) -> Account:
        """Let checks count the allowance and rollover alone, or None: purchased units also. Raises AccountError."""
        with self.world.redis.in_reach():
            account = self.world.ledger.change(user_id, lambda account, _: account._replace(pay_from=pay_from))
            self.world.refresh(user_id)
        return account

    def _require_no_wallet(self, account: Account, meter: str, change: str) -> None:
        """Raise AccountError for a meter that draws on a wallet: its own units pay nothing. `change` is a verb."""
        draw = draws_of(self.world.catalogue, account.plan, account.status).get(meter)
        if draw is not None:
            raise AccountError(f"meter: {meter} draws on the wallet {draw.wallet}; {change} {draw.wallet} instead")

    # -----------------------------------------------------------------------------------------------------------------
    # Time, workers, outages

    @property
    def now(self) -> datetime:
        """The time on the clock of servers and clients."""
        return self.world.redis.now()

    def advance(self, seconds: float | timedelta) -> None:
        """Move that clock forward: holds expire, periods end. Raises ValueError for a time before now."""
        by = seconds if isinstance(seconds, timedelta) else timedelta(seconds=seconds)
        if by < timedelta():
            raise ValueError(f"seconds: at least 0 (got {by.total_seconds():g})")
        self.world.redis.advance(by)

    def apply(self) -> None:
        """Apply the events that wait, as workers do. Needed after `apply_at_once=False`, and after an outage."""
        self.world.apply()

    def redis_down(self) -> AbstractContextManager[None]:
        """Have Redis down for the length of a block: `with fake.redis_down():`."""
        return self.world.redis.down()

    # -----------------------------------------------------------------------------------------------------------------
    # What was recorded

    def account(self, user_id: str) -> Account:
        """Return an account as it is now. Raises AccountError if nothing opened it."""
        with self.world.redis.in_reach():
            if user_id not in self.world.ledger.accounts:
                raise NotFound(f"user_id: no account {user_id}")
            return cast("Account", self.world.ledger.account(user_id).account)

    def balance(self, user_id: str, meter: str) -> Balance:
        """Return the buckets of a meter as they are now. Raises AccountError for an unknown account or meter."""
        balances = self.account(user_id).balances
        _require("meter", meter, balances)
        return balances[meter]

    @property
    def events(self) -> list[UsageEvent]:
        """The events that were recorded, each once: first those applied, in their order, then those that wait."""
        world = self.world
        with world.redis.in_reach():
            payloads = {identity: row.event.payload for identity, row in world.ledger.log.items()}
            recorded = {identity: UsageEvent.model_validate_json(payload) for identity, payload in payloads.items()}
            for partition in keys.partitions_of(world.settings.partitions):
                entries: Any = world.redis.xrange(partition.entries)
                for _, flat in entries:
                    event = UsageEvent.model_validate_json(dict(zip(flat[::2], flat[1::2], strict=True))[b"e"])
                    recorded.setdefault((event.user_id, event.event_id), event)
            return list(recorded.values())

    def parts(self, user_id: str, event_id: str) -> Parts:
        """Return the units that each bucket paid for an applied event. Raises KeyError for any other."""
        row = self.world.ledger.log[user_id, event_id]
        return Parts(**row.split._asdict(), uncollected=row.uncollected)

    @property
    def refused(self) -> list[Refused]:
        """The dead letters: entries that workers refused, with their reasons."""
        return list(self.world.ledger.refused)

    @property
    def holds(self) -> list[OpenHold]:
        """The open holds. Those that the ledger granted while Redis was down are not among them."""
        with self.world.redis.in_reach():
            found = open_holds(self.world.resources, limit=1_000_000)
            return [hold for hold in found if hold.expires_at > self.now]


def _by_meter(units: Units, bucket: str, balances: Mapping[str, Balance], drawing: Container[str]) -> Mapping[str, int]:
    """Return the units of each meter. One number is for those that take such units, not for meters `drawing` on others.

    Raises AccountError for a meter that is not among `balances`.
    """
    if isinstance(units, int):
        taking = [
            meter for meter, balance in balances.items() if bucket == "used" or (balance.spill and meter not in drawing)
        ]
        return dict.fromkeys(taking, units) if units else {}
    for meter in units:
        _require("meter", meter, balances)
    return units


def _with_units(balance: Balance, bucket: str, amount: int) -> Balance:
    """Return the balance with `amount` units in a bucket. Raises AccountError if it cannot have them."""
    if bucket != "rollover" and amount < 0:
        raise AccountError(f"{bucket}: at least 0 (got {amount})")
    if bucket != "used" and amount and not balance.spill:
        raise AccountError(f"{bucket}: {balance.meter} does not spill, so nothing could spend it")
    return Balance(**{**balance._asdict(), bucket: amount})


def _require(field: str, value: str, known: object) -> None:
    """Raise AccountError unless `value` is among the known ones."""
    names = list(cast("Mapping[str, Any]", known))
    if value not in names:
        raise AccountError(f"{field}: unknown {value!r}; there are {', '.join(names)}")
