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

from config.catalogue import Catalogue, CatalogueError
from config.settings import Settings
from schemas.answers import HoldAnswer, HoldState
from worker.admin import accounts
from worker.client.effects import logger
from worker.errors import AccountError, InvalidRequest, LedgerUnavailable
from worker.keyspace.connection import connect
from worker.ledger import batch, sponsorship
from worker.ledger.accounts import (
    Payment,
    closed_users,
    contained_events,
    read_account,
    read_accounts_with_holds,
    read_payment,
)
from worker.ledger.connection import LedgerError, Postgres, batch_connection, is_standby, open_engine
from worker.ledger.faults import fault_of
from worker.ledger.holds import (
    LedgerHold,
    delete_ledger_holds,
    give_back_ledger_hold,
    insert_ledger_hold,
    restate_ledger_hold,
    share_ledger_hold,
)
from worker.resources import CataloguesInForce, Resources
from worker.rules.account import Account, EventsAsked
from worker.rules.lifecycle import as_of, open_account
from worker.rules.preflight import Spend, ledger_hold
from worker.rules.sponsorship import Pool, PoolStanding

# The age at which we ask again which catalogue is in force.
_CATALOGUE_SECONDS = 10.0


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
        self._own_catalogue = catalogue
        self._in_force = CataloguesInForce(settings, catalogue)
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
        return self.account_views([user_id])[user_id]

    def account_views(self, users: Sequence[str]) -> dict[str, AccountView]:
        """Return the accounts of these users now, as `account` does. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            # One round trip: statements of a pipeline are a transaction by themselves, which nobody has to end.
            postgres.autocommit = True
            views = self._views(postgres, users)
            postgres.autocommit = False
            return views

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
                resources = Resources(self._settings, self._own_catalogue, self._engine, redis)
                resources.in_force.follow(self._in_force)
                if account is None:
                    accounts.open_new(resources, user_id, plan)
                else:
                    accounts.change_plan(resources, user_id, plan)
            return True
        except (psycopg.Error, SQLAlchemyError) as error:
            raise LedgerUnavailable(self._reason(error)) from error

    def payment(self, user_id: str, event_id: str) -> Payment | None:
        """Return what paid for a recorded event; None if it is not recorded. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            return read_payment(postgres, user_id, event_id)

    def contained(self, asked: Sequence[EventsAsked]) -> dict[str, set[str]]:
        """Return by user the events that the balance at that version contains. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            return contained_events(postgres, asked)

    def hold(self, spend: Spend, key: str, ttl_seconds: int, call_id: str) -> HoldAnswer:
        """Grant a hold without Redis, under the account's lock: all processes together stay within the balance.

        It does not count events that only Redis knows. A repeat returns the same hold, which is then of more calls than
        `call_id`. Raises UsageDenied, HoldConflict, LedgerUnavailable.
        """
        user_id, meter, amount, backend = spend[:4]
        with self._transaction() as postgres:
            batch.load_for_update(postgres, [user_id], ([], []))
            view = self._views(postgres, [user_id])[user_id]
            held = ledger_hold(view.account, spend, key, view.holds, self._settings.redis_down_max_holds)
            if held is not None:
                if held.call_id is not None:
                    share_ledger_hold(postgres, user_id, key)
                    postgres.commit()
                return hold_answer(user_id, held)
            hold = LedgerHold(key, meter, amount, view.now + timedelta(seconds=ttl_seconds), backend, call_id)
            insert_ledger_hold(postgres, user_id, hold)
            postgres.commit()
            return hold_answer(user_id, hold)

    def give_back_hold(self, user_id: str, hold_key: str, call_id: str) -> bool:
        """Delete a hold that this call made and no other was told of. Return True if none is left under the key.

        Raises LedgerUnavailable.
        """
        with self._transaction() as postgres:
            none_left = give_back_ledger_hold(postgres, user_id, hold_key, call_id)
            postgres.commit()
            return none_left

    def restate_hold(self, user_id: str, hold_key: str, amount: int, *, is_over: bool) -> None:
        """Let a hold that the ledger granted count as `amount`; while it is not over, as that at least.

        Raises LedgerUnavailable.
        """
        with self._transaction() as postgres:
            restate_ledger_hold(postgres, user_id, hold_key, amount, is_over=is_over)
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
        with self._transaction() as postgres:
            initial = self._catalogue.sponsorship.initial
            return sponsorship.read_pool(postgres) or Pool(initial, 0, sponsorship.read_epoch(postgres))

    def standing(self, user_id: str) -> PoolStanding:
        """Return a user's standing with the sponsorship pool. Raises LedgerUnavailable."""
        with self._transaction() as postgres:
            return sponsorship.read_standing(postgres, user_id)

    def _views(self, postgres: Postgres, users: Sequence[str]) -> dict[str, AccountView]:
        found = read_accounts_with_holds(postgres, users)
        catalogue = self._catalogue
        views = {
            user_id: AccountView(account and as_of(catalogue, account, now), now, epoch, holds)
            for user_id, (now, epoch, account, holds) in found.items()
        }
        plan = self._settings.default_plan
        if plan in catalogue.plans and (strangers := [user for user, view in views.items() if view.account is None]):
            closed = closed_users(postgres, strangers)
            for user_id in strangers:
                if user_id not in closed:
                    now = views[user_id].now
                    opened = as_of(catalogue, open_account(catalogue, user_id, plan, "active", now), now)
                    views[user_id] = views[user_id]._replace(account=opened)
        return views

    def _require_primary(self, postgres: Postgres) -> None:
        """Raise LedgerUnavailable for a standby. The connection is then closed, so that a promotion is noticed."""
        if not self._settings.allow_standby and is_standby(postgres):
            raise LedgerUnavailable(
                "DATABASE_URL: names a standby, whose balances may be old; name the primary (with several hosts, "
                "target_session_attrs=read-write), or set METERFALL_ALLOW_STANDBY=true"
            )

    @property
    def _catalogue(self) -> Catalogue:
        """The catalogue in force, as far as the ledger was asked: balances go by it, whatever file we carry."""
        return self._in_force.now()

    def _take_up_catalogues(self, postgres: Postgres) -> None:
        """Ask for the catalogue in force, once in a while.

        Our own file goes on if the ledger has none, does not show it to our role, or has one that we cannot read.
        """
        try:
            self._in_force.refresh(postgres)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege, CatalogueError) as error:
            self._in_force.put_off()
            logger.warning("the catalogue in force cannot be read, going by our own: %s", str(error).strip())
        postgres.rollback()

    @contextmanager
    def _transaction(self) -> Iterator[Postgres]:
        try:
            with batch_connection(self._engine) as postgres:
                self._require_primary(postgres)
                if self._in_force.is_older_than(_CATALOGUE_SECONDS):
                    self._take_up_catalogues(postgres)
                yield postgres
                if self._closed:
                    raise _ClosedMeanwhile
        except _ClosedMeanwhile:
            pass
        except LedgerError as error:
            raise LedgerUnavailable(str(error)) from error
        except (psycopg.Error, SQLAlchemyError) as error:
            raise LedgerUnavailable(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        """Say what Postgres refuses of our settings, or else what it said."""
        return fault_of(error, self._settings) or str(error).strip()


def hold_answer(user_id: str, hold: LedgerHold) -> HoldAnswer:
    """Return the answer about a hold that the ledger granted."""
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
