"""Close an account for good: balances to zero, personal data erased, history kept under a hash.

A secret of the ledger keys the hash. Without the database the hash leads to no person; with it a late repeat of an
event is still known, as identity is for ever. So no command opens a closed id again; workers record later events as
uncollected.
"""

from __future__ import annotations

import re

from worker.admin.change import cause_of, commit, locked, require_users
from worker.errors import AccountError
from worker.keyspace.keys import SPONSORSHIP, account_of
from worker.ledger import reports, sponsorship
from worker.ledger.accounts import existing_accounts, pseudonym_of
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.erasure import dead_letters_containing, delete_renamed, empty_dead_letter, rename_history
from worker.resources import Resources
from worker.rules.account import Account, Balance, Change


def close_account(resources: Resources, user_id: str, *, actor: str | None = None, reason: str | None = None) -> str:
    """Close the account of `user_id`; return the pseudonym that keeps its history.

    Ledger entries empty its buckets. Repeating is harmless: all of it is one transaction. Reasons are free text and
    may name the person: earlier ones are erased, and so is the user's own name as an actor. The reason for closing
    stays, unless it names the user.
    Raises AccountError for an account that never existed, and while its events wait to be applied.
    """
    cause = cause_of(actor, reason)
    require_users([user_id])
    with batch_connection(resources.engine) as postgres:
        pseudonym = pseudonym_of(postgres, user_id)
        known = existing_accounts(postgres, [user_id, pseudonym])
    if known == {pseudonym}:
        return pseudonym
    _require_nothing_pending(resources, user_id)
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
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
        closed = _closed(current, emptied)

        def erase(postgres: Postgres) -> None:
            rename_history(postgres, user_id, pseudonym)
            sponsorship.rename_grants(postgres, resources.catalogue.sponsorship.initial, user_id, pseudonym)
            delete_renamed(postgres, user_id)
            reports.erase(postgres, user_id)
            _erase_dead_letters(postgres, user_id)

        commit(resources, postgres, now, account.then(closed, *steps), last=erase)
    _forget(resources, user_id)
    return pseudonym


def _closed(account: Account, emptied: dict[str, Balance]) -> Account:
    return account._replace(
        status="closed", balances=emptied, next_plan=None, plan_change_at=None, next_status=None, status_change_at=None
    )


def _emptied(balance: Balance) -> Balance:
    """Return the balance with empty buckets and no more periods to come."""
    return balance._replace(
        allowance=0, rollover_cap=0, caps=None, cadence="off", anchor="sticky", period_end=None,
        used=0, rollover=0, purchased=0, cap_used=None, parked=None,
    )  # fmt: skip


def _require_nothing_pending(resources: Resources, user_id: str) -> None:
    account = account_of(user_id, resources.settings.partitions)
    with resources.redis.pipeline(transaction=False) as pipe:
        for meter in resources.catalogue.meters:
            pipe.hkeys(account.pending(meter))
        waiting = [name for names in pipe.execute() for name in names if name.startswith(b"e:")]
    if waiting:
        raise AccountError(f"user_id: {len(waiting)} events of {user_id} are not applied yet; close it after them")


def _erase_dead_letters(postgres: Postgres, user_id: str) -> None:
    """Empty the payloads of this user's dead letters; their rows stay."""
    # By pattern: a refused payload may be anything, as half an event or one without a meter. Some write \/ for /.
    for written in {user_id, user_id.replace("/", "\\/")}:
        names_user = re.compile(rb'"(?:user_id|user|r)"\s*:\s*"' + re.escape(written.encode()) + b'"').search
        for letter_id, payload in dead_letters_containing(postgres, written):
            if names_user(payload):
                empty_dead_letter(postgres, letter_id)


def _forget(resources: Resources, user_id: str) -> None:
    """Delete the user's data in Redis; if we die before it, they expire."""
    account = account_of(user_id, resources.settings.partitions)
    resources.redis.delete(account.balance, account.lease)
    resources.redis.delete(SPONSORSHIP.standing(user_id), SPONSORSHIP.standing_lease(user_id))
