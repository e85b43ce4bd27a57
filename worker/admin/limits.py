"""Limits of an account per day, week or month, and what its checks may count: changes by operators and users.

Every change is a ledger entry under the account's lock; see worker/admin/change.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, get_args

from schemas.events import MAX_AMOUNT
from worker.admin.change import (
    Held,
    answer,
    cause_of,
    commit,
    locked,
    moved,
    require_identifier,
    require_meter,
    require_no_wallet,
    with_meter,
)
from worker.errors import AccountError, KeyConflict
from worker.ledger.accounts import read_entry, spent_since
from worker.ledger.connection import Postgres
from worker.resources import Resources
from worker.rules.account import Change, ChangeAnswer, schedule_of
from worker.rules.lifecycle import account_step, timezone_of
from worker.rules.limits import PERS, Limits, Per, Window, bounds

# Who may set a limit by a call; a plan sets its own in the catalogue.
By = Literal["operator", "user"]
BY: tuple[By, ...] = get_args(By)


def set_limit(
    resources: Resources,
    user_id: str,
    meter: str,
    per: str,
    amount: int | None,
    *,
    key: str | None = None,
    of: str = "operator",
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Bound what an account spends of a meter `per` day, week or month to `amount` units; None takes the limit away.

    The limit is that of an `operator` or of the `user`. Those of others stay, and so does the plan's: the least of them
    counts. What the window that is open has used already counts. `key` makes repeats harmless; without one, a call for
    the amount in force changes nothing.
    A limit of a wallet counts what all its meters cost. A meter that draws on one can be given none: a limit that it
    has rests until the account is on a plan that has the meter by itself.
    Raises AccountError for an unknown account, meter, window or setter, for a meter that draws on a wallet, for an
    amount out of range, and for a key of another limit.
    """
    cause = cause_of(actor, reason)
    require_meter(resources, meter)
    window_of = next((each for each in PERS if each == per), None)
    if window_of is None:
        raise AccountError(f"per: must be one of {', '.join(PERS)} (got {str(per)[:64]!r})")
    setter = next((each for each in BY if each == of), None)
    if setter is None:
        raise AccountError(f"of: must be one of {', '.join(BY)} (got {str(of)[:64]!r})")
    if amount is not None and (type(amount) is not int or not 1 <= amount <= MAX_AMOUNT):
        raise AccountError(
            f"amount: must be a whole number from 1 to {MAX_AMOUNT}, or None to take the limit away "
            f"(got {str(amount)[:64]})"
        )
    if key is not None:
        require_identifier("key", key)
    told = {"per": per, "set_by": of, "amount": amount}
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        if key is not None and (known := read_entry(postgres, user_id, f"limit:{key}", meter)) is not None:
            if {name: known.detail[name] for name in told} != told:
                raise KeyConflict(f"key: {key} was used for {_in_words(known.detail)} of {meter}")
            return answer(resources, account.current, now, repeated=True)
        found = account.current.balances.get(meter)
        limits = (found.limits if found is not None else None) or Limits()
        in_force = limits.amount(setter, window_of)
        if key is None and in_force == amount:
            return answer(resources, account.current, now, repeated=True)
        if amount is not None:
            require_no_wallet(resources, account.current, meter, "limit")  # what it draws counts there
        account, before = with_meter(resources, account, meter, now)
        detail: dict[str, object] = {**told, "before": in_force}
        after = limits.with_amount(setter, window_of, amount)
        if amount is not None and after is not None and window_of not in after.windows:
            window = _counted(resources, postgres, account, meter, window_of, now)
            detail |= {"window": window.as_json(), "timezone": timezone_of(resources.catalogue, account.current)}
            after = after._replace(windows={**after.windows, window_of: window})
        step = Change(
            kind="set_limit",
            key=f"limit:{key}" if key is not None else f"limited:{now.isoformat()}:{account.stored.version}",
            meter=meter,
            before=before,
            after=before._replace(limits=after),
            detail=detail,
        )
        return commit(resources, postgres, now, moved(account, step))


def _counted(resources: Resources, postgres: Postgres, account: Held, meter: str, per: Per, now: datetime) -> Window:
    """Return the window that is open now, with what events that were applied in it have used."""
    starts, ends = bounds(per, now, timezone_of(resources.catalogue, account.current))
    since, used = spent_since(postgres, account.stored.user_id, meter, starts, account.stored.version + 1)
    return Window(starts, ends, since, used)


def set_pay_from(
    resources: Resources,
    user_id: str,
    pay_from: str | None,
    *,
    actor: str | None = None,
    reason: str | None = None,
) -> ChangeAnswer:
    """Let checks, holds and charges of an account count its `allowance` and rollover alone; None: purchased units also.

    Events are recorded all the same, and take from purchased units also. Repeating is harmless.
    Raises AccountError for an unknown account or word.
    """
    cause = cause_of(actor, reason)
    if pay_from is not None and pay_from != "allowance":
        raise AccountError(f"pay_from: must be allowance, or None (got {str(pay_from)[:64]!r})")
    with locked(resources, user_id, cause=cause) as (postgres, now, (account,)):
        current = account.current
        if current.pay_from == pay_from:
            return answer(resources, current, now, repeated=True)
        current = current._replace(pay_from=pay_from)
        step = account_step("set_pay_from", f"pay_from:{now.isoformat()}:{current.version}", schedule_of(current))
        return commit(resources, postgres, now, account.then(current, step))


def _in_words(detail: Mapping[str, Any]) -> str:
    amount = detail["amount"]
    return f"{'no limit' if amount is None else amount} per {detail['per']} of the {detail['set_by']}"
