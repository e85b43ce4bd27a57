"""Questions of pre-flight calls to the ledger: values that are not cached, and holds while Redis is down.

Imported only when Postgres is needed; producers otherwise need redis and pydantic alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from typing import NamedTuple

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from config.catalogue import Catalogue
from config.settings import Settings
from schemas.answers import HoldAnswer, HoldState, Reason
from worker.admin import accounts
from worker.errors import AccountError, HoldConflict, InvalidRequest, LedgerUnavailable, UsageDenied
from worker.keyspace.connection import connect
from worker.ledger import batch, sponsorship
from worker.ledger.accounts import closed_users, contained_events, read_account, read_account_with_holds
from worker.ledger.connection import LedgerError, Postgres, batch_connection, open_engine
from worker.ledger.holds import LedgerHold, delete_ledger_holds, insert_ledger_hold, settle_ledger_hold
from worker.resources import Resources
from worker.rules.account import Account
from worker.rules.lifecycle import as_of, open_account
from worker.rules.preflight import Spend, denied, ledger_check
from worker.rules.sponsorship import Pool, PoolStanding


class AccountView(NamedTuple):
    """An account at one moment of the ledger's clock.

    None: it was never opened and there is no default plan, or it was closed for good.
    """

    account: Account | None
    now: datetime
    epoch: int
    holds: list[LedgerHold]


class _ClosedMeanwhile(Exception):
    """The pool would keep the connection for ever: it was given back after the pool was closed."""


class LedgerView:
    """Reads for one process, over a pool of connections."""

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        """Raise LedgerUnavailable if DATABASE_URL is unset."""
        self._closed = False
        self._settings = settings
        self._catalogue = catalogue
        try:
            self._engine = open_engine(settings)
        except LedgerError as error:
            raise LedgerUnavailable(str(error)) from error

    def close(self) -> None:
        """Close the connections; one that is in use, once it is not any more."""
        self._closed = True
        self._engine.dispose()

    def account(self, user_id: str) -> AccountView:
        """Return the account now; compute due boundaries, and do not store them. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            # One round trip: statements of a pipeline are a transaction by themselves, which nobody has to end.
            postgres.autocommit = True
            view = self._view(postgres, user_id)
            postgres.autocommit = False
            return view

    def on_tier(self, user_id: str, plan: str) -> bool:
        """Put the account on `plan` unless it is on it already; open a missing one. A request may carry its tier.

        Returns True if that changed the account: the cached balance is then out of date until a worker publishes.
        Repeating is harmless. Raises InvalidRequest for an unknown plan, AccountError for a closed account,
        LedgerUnavailable, and the errors of Redis.
        """
        if plan not in self._catalogue.plans:
            raise InvalidRequest("tier", plan, "one of " + ", ".join(sorted(self._catalogue.plans)))
        try:
            return self._change_tier(user_id, plan)
        except AccountError:
            return self._change_tier(user_id, plan)  # another call opened the account meanwhile

    def _change_tier(self, user_id: str, plan: str) -> bool:
        with self._transaction() as postgres:
            now, _, account = read_account(postgres, user_id)
        # As a check sees it: a due change counts, though it is not stored yet.
        if account is not None and as_of(self._catalogue, account, now).plan == plan:
            return False
        try:
            with closing(connect(self._settings)) as redis:
                resources = Resources(self._settings, self._catalogue, self._engine, redis)
                if account is None:
                    accounts.open_new(resources, user_id, plan)
                else:
                    accounts.change_plan(resources, user_id, plan)
            return True
        except (psycopg.Error, SQLAlchemyError) as error:
            raise LedgerUnavailable(str(error).strip()) from error

    def contained(self, user_id: str, event_ids: Sequence[str], version: int) -> set[str]:
        """Return the events that the balance at `version` contains. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            return contained_events(postgres, user_id, event_ids, version)

    def hold(self, spend: Spend, key: str, ttl_seconds: int) -> HoldAnswer:
        """Grant a hold without Redis, under the account's lock: all processes together stay within the balance.

        It does not count events that only Redis knows. A repeat returns the same hold. Raises UsageDenied,
        HoldConflict, LedgerUnavailable.
        """
        user_id, meter, amount, backend = spend
        with self._transaction() as postgres:
            batch.load_for_update(postgres, [user_id], ([], []))
            view = self._view(postgres, user_id)
            for held in view.holds:
                if held.key == key and (held.meter, held.amount, held.backend) != (meter, amount, backend):
                    raise HoldConflict(user_id, key, held.meter, held.amount, held.backend)
                if held.key == key:
                    return _answer(user_id, held)
            answer = ledger_check(view.account, spend, view.holds)
            if not answer.allowed:
                raise denied(answer)
            # An account that its first event will open has no row to lock yet.
            unopened = view.account is None or view.account.version == 0
            if unopened or len(view.holds) >= self._settings.redis_down_max_holds:
                reason = Reason.REDIS_DOWN_DENIED if unopened else Reason.REDIS_DOWN_BOUND_REACHED
                raise UsageDenied(answer.model_copy(update={"allowed": False, "reason": reason}))
            hold = LedgerHold(key, meter, amount, view.now + timedelta(seconds=ttl_seconds), backend)
            insert_ledger_hold(postgres, user_id, hold)
            postgres.commit()
            return _answer(user_id, hold)

    def settle_hold(self, user_id: str, hold_key: str, amount: int) -> None:
        """Let a hold that the ledger granted count as what its work cost. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            settle_ledger_hold(postgres, user_id, hold_key, amount)
            postgres.commit()

    def forget_holds(self, user_id: str, hold_keys: Sequence[str]) -> None:
        """Delete holds that Redis has taken over, or that were released. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            delete_ledger_holds(postgres, user_id, hold_keys)
            postgres.commit()

    def pool(self) -> Pool:
        """Return the sponsorship pool; the catalogue's initial one if no batch has opened it yet.

        Raises LedgerUnavailable.
        """
        initial = self._catalogue.sponsorship.initial
        with self._transaction() as postgres:
            return sponsorship.read_pool(postgres) or Pool(initial, 0, sponsorship.read_epoch(postgres))

    def standing(self, user_id: str) -> PoolStanding:
        """Return a user's standing with the sponsorship pool. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            return sponsorship.read_standing(postgres, user_id)

    def _view(self, postgres: Postgres, user_id: str) -> AccountView:
        now, epoch, account, holds = read_account_with_holds(postgres, user_id)
        if account is not None:
            account = as_of(self._catalogue, account, now)
        elif self._settings.default_plan is not None and not closed_users(postgres, [user_id]):
            account = open_account(self._catalogue, user_id, self._settings.default_plan, "active", now)
        return AccountView(account, now, epoch, holds)

    @contextmanager
    def _transaction(self) -> Iterator[Postgres]:
        try:
            with batch_connection(self._engine) as postgres:
                yield postgres
                if self._closed:
                    raise _ClosedMeanwhile
        except _ClosedMeanwhile:
            pass
        except (psycopg.Error, SQLAlchemyError) as error:
            raise LedgerUnavailable(str(error).strip()) from error


def _answer(user_id: str, hold: LedgerHold) -> HoldAnswer:
    return HoldAnswer(
        user_id=user_id,
        meter=hold.meter,
        key=hold.key,
        state=HoldState.HELD,
        amount=hold.amount,
        left=hold.amount,
        expires_at=hold.expires_at,
        backend=hold.backend,
    )
