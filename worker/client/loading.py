"""Loads of balances from Postgres that a script does not find cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

from redis import exceptions as redis_errors

from config.log import name_in_logs
from worker.client.effects import DOWN, Ask, Command, Effects, LoadTurn, Pipeline, logger, run_script, unconfirmed
from worker.client.session import Context
from worker.client.turns import Turn
from worker.errors import (
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
)
from worker.keyspace import calls
from worker.keyspace.cache import cache_text, cache_ttl_ms, unknown_account_text
from worker.keyspace.scripts import Call
from worker.rules.account import Account

# Loads that may lose their lease to a publish before the call gives up; each reads Postgres anew.
_LOAD_ATTEMPTS = 50


# Long enough for the script that caused the load.
_SHORTEST_LIFE_MS = 50


# Reads a value from Postgres that a script did not find, and caches it. Takes the script's answer and the shortest life
# (ms) of the cached value; returns True if its life was over before it came. None: no value is missing.
Load = Callable[[bytes, int], Effects[bool] | None]


def run_loading(context: Context, request: Call, load: Load, needed: str) -> Effects[Any]:
    """Run a script; if it does not find a cached value, load the value and run the script again.

    Raises RedisUnavailable if the value, named `needed`, changes faster than it can be loaded.
    """
    shortest_life_ms = 0
    for _ in range(_LOAD_ATTEMPTS):
        grants = context.let_through.grants
        reply = yield from run_script(request)
        context.let_through.redis_answered(grants)
        loading = load(reply[0], shortest_life_ms)
        if loading is None:
            return reply
        was_late = yield from loading
        # The next load is after the boundary. If it is late again, its life is shorter than a load takes.
        shortest_life_ms = _SHORTEST_LIFE_MS if was_late else 0
    raise RedisUnavailable(f"{needed} changed {_LOAD_ATTEMPTS} times while it was loaded")


def take_lease(context: Context, lease: str) -> Effects[bytes]:
    """Take the right to cache later reads from Postgres; return its token."""
    token: bytes = yield from run_script(calls.lease(lease, token_hex(8), context.settings.load_lease_ttl_ms))
    return token


def gated(context: Context, user_id: str, request: Call, *, once: bytes | None = None) -> Effects[Any]:
    """Run a script that needs the balance; load the balance if it is not cached.

    An answer of `once` is also worth a load, but no second one.
    """
    worth_a_load = {b"load", once}

    def load(answer: bytes, shortest_life_ms: int) -> Effects[bool] | None:
        if answer not in worth_a_load:
            return None
        worth_a_load.discard(once)
        return _load_in_turn(context, user_id, shortest_life_ms)

    return (yield from run_loading(context, request, load, f"the balance of {user_id}"))


def _load_in_turn(context: Context, user_id: str, shortest_life_ms: int) -> Effects[bool]:
    """Load a balance, unless somebody else in this process just did. See `_load`.

    The lease is taken after the turn has come: however long that takes, it does not end before Postgres answers.
    """
    turn: Turn | None = yield LoadTurn(user_id)
    if turn is None:
        return False
    try:
        return (yield from _load(context, user_id, shortest_life_ms))
    except LedgerUnavailable as error:
        turn.end(error)
        raise
    finally:
        turn.end(None)


def _load(context: Context, user_id: str, shortest_life_ms: int) -> Effects[bool]:
    """Read a balance from Postgres and cache it; return True if its life was over before it came.

    If a publish or a boundary came in between, it is not cached, and the caller retries. Events that the balance
    contains leave pending in the same step. Holds that the ledger granted while Redis was down become holds here.
    """
    keys = context.account(user_id)
    token = yield from take_lease(context, keys.lease)
    view = yield Ask(lambda ledger: ledger.account(user_id))
    account: Account | None = view.account
    if account is not None and account.user_id != user_id:
        # Whatever it comes from, a balance that is cached under another name would be spent by the wrong user.
        raise LedgerUnavailable(f"Postgres answered about another account than {user_id}")
    if account is None:
        text, ttl_ms, meters = unknown_account_text(view.epoch), context.settings.cache_ttl_ms, []
    else:
        text = cache_text(view.epoch, account)
        ttl_ms = cache_ttl_ms(account, view.now, context.settings.cache_ttl_ms)
        meters = [name for meter in account.balances for name in (meter, *context.sub_meters(meter))]
    pending = [keys.pending(meter) for meter in meters]
    listed = (yield Pipeline(tuple(("HKEYS", name) for name in pending), short=True)) if pending else []
    events = [[raw[2:].decode() for raw in names if raw.startswith(b"e:")] for names in listed]
    contained: set[str] = set()
    if account is not None and any(events):
        known = [event_id for ids in events for event_id in ids]
        contained = yield Ask(lambda ledger: ledger.contained(user_id, known, account.version))
    gone = [
        (name, [f"e:{event_id}" for event_id in ids if event_id in contained])
        for name, ids in zip(pending, events, strict=True)
    ]
    installed = yield from run_script(
        calls.install(
            keys.balance, keys.lease, token, text, ttl_ms=ttl_ms, shortest_life_ms=shortest_life_ms, gone=gone
        )
    )
    for hold in view.holds:
        ttl = max(1, int((hold.expires_at - view.now).total_seconds()))
        sub_meter = context.sub_meter(hold.meter, hold.backend)
        request = calls.reserve(
            keys, hold.meter, hold.amount, hold.key, sub_meter=sub_meter,
            ttl_ms=ttl * 1_000, outcome_ttl_ms=context.outcome_ttl_ms, unchecked=True,
        )  # fmt: skip
        yield from run_script(request)
    yield from forget_ledger_holds(context, user_id, [hold.key for hold in view.holds])
    return bool(installed == b"late")


def take_tier(context: Context, user_id: str, meter: str, tier: str) -> Effects[None]:
    """Put the account on the plan `tier` if it is on another, and drop its cached balance of the plan before."""
    tiers = sorted(code for code, plan in context.catalogue.plans.items() if meter in plan.meters)
    if tier not in tiers:
        raise InvalidRequest("tier", tier, f"a plan with {meter}: {', '.join(tiers) or 'there is none'}")
    try:
        changed = yield Ask(lambda ledger: ledger.on_tier(user_id, tier))
    except redis_errors.RedisError as error:
        raise unconfirmed(error) from error
    if not changed:
        return
    keys = context.account(user_id)
    try:
        yield Command(("DEL", keys.balance, keys.lease))
    except DOWN as error:
        who = name_in_logs(user_id, context.settings.log_user_ids)
        logger.warning("the balance of %s stays as it was until it is published: %s", who, error)


def forget_ledger_holds(context: Context, user_id: str, hold_keys: Sequence[str]) -> Effects[None]:
    """Delete ledger holds that Redis has taken over. If this fails, the next load finds them again."""
    if not hold_keys:
        return
    try:
        yield Ask(lambda ledger: ledger.forget_holds(user_id, hold_keys))
    except LedgerUnavailable as error:
        who = name_in_logs(user_id, context.settings.log_user_ids)
        logger.warning("holds of %s stay in the ledger until they expire: %s", who, error)
