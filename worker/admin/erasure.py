"""Close an account: balances to zero, personal data erased, history kept under a hash. Open its id anew.

A secret of the ledger keys the hash. Without the database the hash leads to no person; with it a late repeat of an
event is still known, as identity is for ever. Workers record later events of a closed id as uncollected, until `reopen`
lets it begin anew: with nothing of its history but the events that it may not bill again.
"""

from __future__ import annotations

import re
from datetime import datetime

import psycopg

from worker.admin.change import answer, cause_of, commit, locked, refresh, refresh_trust, require_flag, require_users
from worker.admin.pending import Pending, read_pending
from worker.errors import AccountError
from worker.keyspace.keys import SPONSORSHIP, account_of
from worker.ledger import batch, checkpoints, reports, sponsorship
from worker.ledger.accounts import closed_users, existing_accounts, histories_of, pseudonym_of, read_entry
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.erasure import (
    dead_letters_containing,
    delete_renamed,
    empty_dead_letters,
    erase_reasons,
    rename_history,
)
from worker.ledger.losses import rename_freed
from worker.ledger.notices import erase_notices
from worker.ledger.repeats import rename_repeats
from worker.ledger.summing import rename_sums
from worker.resources import Resources
from worker.rules.account import Account, Balance, Change, ChangeAnswer, without_schedule
from worker.rules.credits import cross_grants, grants_on
from worker.rules.grants import Grants
from worker.rules.history import open_for_good
from worker.rules.lifecycle import open_account
from worker.rules.rows import Writes
from worker.rules.words import counted


def close_account(
    resources: Resources, user_id: str, *, forfeit: bool = False, actor: str | None = None, reason: str | None = None
) -> str:
    """Close the account of `user_id`; return the pseudonym that keeps its history.

    Ledger entries empty its buckets. Repeating is harmless: all of it is one transaction. Reasons are free text and
    may name the person: earlier ones are erased, and so is the user's own name as an actor. The reason for closing
    stays, unless it names the user.
    Raises AccountError for an account that never existed. Unless `forfeit` says to lose them, also for purchased units,
    credit to come, rollover, open holds, and events that wait to be applied: these would be recorded as uncollected.
    """
    cause = cause_of(actor, reason)
    require_users([user_id])
    require_flag("forfeit", forfeit)
    with batch_connection(resources.engine) as postgres:
        if not existing_accounts(postgres, [user_id]) and (closed := closed_users(postgres, [user_id])):
            return closed[user_id]
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        lost = _lost(account.current, now, read_pending(resources, postgres, user_id))
        if lost and not forfeit:
            raise AccountError(f"forfeit: closing {user_id} loses {', '.join(lost)}; say so with forfeit (--forfeit)")
        pseudonym = pseudonym_of(postgres, user_id, account.current.reopened)
        current = account.current
        steps = [
            Change(
                kind="close",
                key="close",
                meter="",
                before=None,
                after=None,
                detail={"status": "closed", "before": current.status},
            )
        ]
        emptied = {meter: _emptied(balance) for meter, balance in current.balances.items()}
        steps += [
            Change(kind="close", key="close", meter=meter, before=current.balances[meter], after=after, detail={})
            for meter, after in emptied.items()
        ]
        zeroed = _closed(current, emptied)

        def erase(postgres: Postgres) -> None:
            rename_history(postgres, user_id, pseudonym)
            rename_repeats(postgres, user_id, pseudonym)
            rename_freed(postgres, user_id, pseudonym)
            sponsorship.rename_grants(postgres, resources.catalogue.sponsorship.initial, user_id, pseudonym)
            delete_renamed(postgres, user_id)
            reports.erase(postgres, user_id)
            erase_notices(postgres, user_id)
            rename_sums(postgres, user_id, pseudonym)
            _erase_dead_letters(postgres, user_id)
            checkpoints.erase(postgres, user_id)

        commit(resources, postgres, now, account.then(zeroed, *steps), last=erase)
    _forget(resources, user_id)
    return pseudonym


def reopen(
    resources: Resources, user_id: str, plan: str, *, actor: str | None = None, reason: str | None = None
) -> ChangeAnswer:
    """Let the id of a closed account begin anew on `plan`, with a first period and nothing else.

    Its history stays under the pseudonym. Late repeats of events from before stay known, and bill nothing; so do the
    orders that were used. Repeating is harmless until the account is closed again.
    Raises AccountError for an id that was never closed or has an account, CatalogueError for an unknown plan.
    """
    cause = cause_of(actor, reason)
    require_users([user_id])
    resources.catalogue.plan(plan)
    with batch_connection(resources.engine) as postgres:
        loaded = batch.load_for_update(postgres, [user_id], ([], []))
        account = loaded.accounts.get(user_id)
        if account is not None:
            opened = read_entry(postgres, user_id, "open", "")
            if account.reopened and opened is not None and opened.detail["plan"] == plan:
                refresh(resources, [user_id])  # the first call may have died before it
                return answer(resources, account, loaded.now, repeated=True)
            raise AccountError(f"user_id: {user_id} has an account already")
        closed = histories_of(postgres, [user_id]).get(user_id)
        if closed is None:
            raise AccountError(f"user_id: {user_id} was never closed; open it")
        writes = Writes.none()
        account = open_account(resources.catalogue, user_id, plan, "active", loaded.now)
        account = account._replace(reopened=len(closed))
        account = open_for_good(writes, account, loaded.now, cause, reopened=len(closed))
        try:
            batch.store_and_commit(postgres, writes, loaded.now)
        except psycopg.errors.UniqueViolation:
            raise AccountError(f"user_id: {user_id} has an account already") from None
    refresh(resources, [user_id])
    refresh_trust(resources, [user_id])
    return ChangeAnswer(account)


def _lost(account: Account, now: datetime, pending: Pending) -> list[str]:
    """Say what an account loses with its closing at `now`. Credit that has ended is lost already, stored or not."""
    lost = []
    for meter, balance in sorted(account.balances.items()):
        grants = _grants_at(balance, now)
        if units := grants.units():
            lost.append(f"{units} purchased of {meter}")
        if units := sum(grant.left for grant in grants.to_come):
            lost.append(f"{units} to come of {meter}")
        if balance.rollover > 0:
            lost.append(f"{balance.rollover} rollover of {meter}")
    lost += [f"{counted(len(holds), 'open hold')} of {meter}" for meter, holds in sorted(pending.holds.items())]
    if pending.events:
        lost.append(f"{counted(pending.events, 'event')} not applied yet")
    return lost


def _grants_at(balance: Balance, now: datetime) -> Grants:
    """Return the grants of a balance after each start and end that is due at `now`."""
    for _, after in cross_grants(balance, now):
        balance = after
    return grants_on(balance)


def _closed(account: Account, emptied: dict[str, Balance]) -> Account:
    return without_schedule(account)._replace(status="closed", balances=emptied, notices=None)


def _emptied(balance: Balance) -> Balance:
    """Return the balance with empty buckets and no more periods to come."""
    return balance._replace(
        allowance=0, rollover_cap=0, caps=None, cadence="off", anchor="sticky", period_end=None, backing=None,
        used=0, rollover=0, purchased=0, cap_used=None, parked=None, carried=0, grants=None,
        limits=None,
    )  # fmt: skip


def _erase_dead_letters(postgres: Postgres, user_id: str) -> None:
    """Empty the payloads of this user's dead letters; their rows stay."""
    found: set[int] = set()
    # By pattern: a refused payload may be anything, as half an event or one without a meter. Some write \/ for /.
    for written in {user_id, user_id.replace("/", "\\/")}:
        names_user = re.compile(rb'"(?:user_id|user|r)"\s*:\s*"' + re.escape(written.encode()) + b'"').search
        found |= {number for number, payload in dead_letters_containing(postgres, written) if names_user(payload)}
    empty_dead_letters(postgres, sorted(found))
    erase_reasons(postgres, user_id)


def _forget(resources: Resources, user_id: str) -> None:
    """Delete the user's data in Redis; if we die before it, they expire."""
    account = account_of(user_id, resources.settings.partitions)
    resources.redis.delete(account.balance, account.lease, account.version)
    resources.redis.delete(SPONSORSHIP.standing(user_id), SPONSORSHIP.standing_lease(user_id))
