"""A ledger in memory: accounts, the usage log and the pool, and the answers that a client asks Postgres for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from config.catalogue import Catalogue
from config.settings import Settings
from schemas.answers import HoldAnswer
from worker.client.ledger import AccountView, hold_answer
from worker.errors import InvalidRequest, NotFound
from worker.ledger.accounts import Payment
from worker.ledger.holds import LedgerHold
from worker.rules import lifecycle
from worker.rules.account import Account, Change, EventsAsked
from worker.rules.entry_times import stream_time
from worker.rules.history import open_for_good
from worker.rules.lifecycle import change_plan
from worker.rules.preflight import Spend, ledger_hold
from worker.rules.received import Refused
from worker.rules.rows import AppliedEvent, Writes
from worker.rules.sponsorship import CreditRow, GrantRow, Pool, PoolStanding

# A ledger in memory is never restored from a backup.
EPOCH = 1


@dataclass
class MemoryLedger:
    """The ledger of one fake. Its methods are those of `worker.client.ledger.LedgerView`, and answer the same."""

    settings: Settings
    catalogue: Catalogue
    now: Callable[[], datetime]
    accounts: dict[str, Account] = field(default_factory=dict)
    log: dict[tuple[str, str], AppliedEvent] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    holds: dict[tuple[str, str], LedgerHold] = field(default_factory=dict)
    grants: list[GrantRow] = field(default_factory=list)
    credits: list[CreditRow] = field(default_factory=list)
    stored_pool: Pool | None = None

    def account(self, user_id: str) -> AccountView:
        """Return the account now, with due boundaries, which are not stored."""
        now = self.now()
        account = self.accounts.get(user_id)
        if account is None and self.settings.default_plan is not None:
            account = lifecycle.open_account(self.catalogue, user_id, self.settings.default_plan, "active", now)
        if account is not None:
            account = lifecycle.as_of(self.catalogue, account, now)
        holds = [hold for (owner, _), hold in self.holds.items() if owner == user_id and hold.expires_at > now]
        return AccountView(account, now, EPOCH, holds)

    def account_views(self, users: Sequence[str]) -> dict[str, AccountView]:
        """Return the accounts of these users now, as `account` does."""
        return {user_id: self.account(user_id) for user_id in users}

    def on_tier(self, user_id: str, plan: str) -> bool:
        """Put the account on `plan`; open a missing one. True if that changed it. Raises InvalidRequest."""
        if plan not in self.catalogue.plans:
            raise InvalidRequest("tier", plan, "one of " + ", ".join(sorted(self.catalogue.plans)))
        now = self.now()
        account = self.accounts.get(user_id)
        if account is None:
            self.open(lifecycle.open_account(self.catalogue, user_id, plan, "active", now))
            return True
        if lifecycle.as_of(self.catalogue, account, now).plan == plan:
            return False
        self.change_plan(user_id, plan)
        return True

    def payment(self, user_id: str, event_id: str) -> Payment | None:
        """Return what paid for a recorded event; None if it is not recorded."""
        applied = self.log.get((user_id, event_id))
        if applied is None:
            return None
        event, draw = applied.event, applied.draw
        amount = event.amount if draw is None else applied.amount
        return Payment(
            event.meter, event.quantity, event.multiplier, amount, *applied.split, uncollected=applied.uncollected,
            wallet=draw and draw.wallet,
        )  # fmt: skip

    def contained(self, asked: Sequence[EventsAsked]) -> dict[str, set[str]]:
        """Return by user the events that the balance at that version contains."""
        return {user_id: set(self._contained(user_id, version, ids)) for user_id, version, ids in asked}

    def _contained(self, user_id: str, version: int, event_ids: Sequence[str]) -> Iterator[str]:
        for event_id in event_ids:
            row = self.log.get((user_id, event_id))
            if row is not None and (row.seq or 0) <= version:
                yield event_id

    def hold(self, spend: Spend, key: str, ttl_seconds: int, call_id: str) -> HoldAnswer:
        """Grant a hold without Redis. Raises UsageDenied, HoldConflict."""
        account, now, _, holds = self.account(spend.user_id)
        held = ledger_hold(account, spend, key, holds, self.settings.redis_down_max_holds)
        if held is None:
            ends = now + timedelta(seconds=ttl_seconds)
            held = LedgerHold(key, spend.meter, spend.amount, ends, spend.backend, call_id)
            self.holds[spend.user_id, key] = held
        elif held.call_id is not None:
            self.holds[spend.user_id, key] = held._replace(call_id=None)
        return hold_answer(spend.user_id, held)

    def give_back_hold(self, user_id: str, hold_key: str, call_id: str) -> bool:
        """Delete a hold that this call made and no other was told of. Return True if none is left under the key."""
        if (held := self.holds.get((user_id, hold_key))) is not None and held.call_id == call_id:
            del self.holds[user_id, hold_key]
        return (user_id, hold_key) not in self.holds

    def restate_hold(self, user_id: str, hold_key: str, amount: int, *, is_over: bool) -> None:
        """Let a hold of the ledger count as what its work cost; while it is not over, as that at least."""
        if (held := self.holds.get((user_id, hold_key))) is not None:
            self.holds[user_id, hold_key] = held._replace(amount=amount if is_over else max(held.amount, amount))

    def forget_holds(self, user_id: str, hold_keys: Sequence[str]) -> None:
        """Delete holds that Redis has taken over, or that were released."""
        for key in hold_keys:
            self.holds.pop((user_id, key), None)

    def pool(self) -> Pool:
        """Return the sponsorship pool."""
        return self.stored_pool or Pool(self.catalogue.sponsorship.initial, 0, EPOCH)

    def standing(self, user_id: str) -> PoolStanding:
        """Return a user's standing with the pool."""
        account = self.accounts.get(user_id)
        own = [grant for grant in self.grants if grant.user_id == user_id]
        window = max((grant.window_start for grant in own), default=None)
        absorbed = sum(grant.absorbed for grant in own if grant.window_start == window)
        tier, version = (account.trust, account.version) if account else (None, 0)
        return PoolStanding(tier, version, EPOCH, window, absorbed)

    def close(self) -> None:
        """Do nothing: another client may share this ledger."""

    # -----------------------------------------------------------------------------------------------------------------
    # Changes

    def open(self, account: Account) -> Account:
        """Store a new account, at the version that its ledger entries give it."""
        self.accounts[account.user_id] = open_for_good(Writes.none(), account, self.now())
        return self.accounts[account.user_id]

    def change(self, user_id: str, change: Callable[[Account, list[Change]], Account]) -> Account:
        """Bring an account up to date, change it and store it. Raises AccountError for an unknown one."""
        if user_id not in self.accounts:
            raise NotFound(f"user_id: no account {user_id}")
        account, steps = lifecycle.bring_all_up_to_date(self.catalogue, self.accounts[user_id], self.now())
        account = change(account, steps)
        self.accounts[user_id] = account._replace(version=account.version + max(1, len(steps)))
        return self.accounts[user_id]

    def spent_since(self, user_id: str, meter: str, starts: datetime) -> tuple[int, int]:
        """Return the number of the last event before `starts`, and the units of a meter after it."""
        own = [row for (owner, _), row in self.log.items() if owner == user_id]
        since = max((row.seq or 0 for row in own if stream_time(row.event.entry_id, self.now()) < starts), default=0)
        paid = [row for row in own if (row.draw.wallet if row.draw else row.event.meter) == meter]
        return since, sum(row.amount for row in paid if (row.seq or 0) > since)

    def change_plan(self, user_id: str, plan: str) -> Account:
        """Put an account on another plan now. Raises AccountError."""
        now = self.now()
        return self.change(user_id, lambda account, steps: change_plan(self.catalogue, account, plan, now, steps))
