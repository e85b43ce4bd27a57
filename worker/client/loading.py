"""Loads of balances from Postgres that a script does not find cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

from config.log import name_in_logs
from worker.client.effects import (
    DOWN,
    Ask,
    Command,
    Effects,
    LoadTurn,
    Pause,
    Pipeline,
    logger,
    run_script,
    unconfirmed,
)
from worker.client.session import Context
from worker.client.turns import Turn
from worker.errors import (
    InvalidRequest,
    LedgerUnavailable,
    RedisUnavailable,
)
from worker.keyspace import calls
from worker.keyspace.cache import CacheLife, cache_life, cache_text, unknown_account_text
from worker.keyspace.calls import Gone
from worker.keyspace.keys import AccountKeys
from worker.keyspace.scripts import Call
from worker.rules.account import Account

if TYPE_CHECKING:
    from worker.client.ledger import LedgerView

# Loads that may lose their lease to a publish before the call gives up; each reads Postgres anew.
_LOAD_ATTEMPTS = 50


# Ids of pending events that are read from Redis and looked for in Postgres at once, and that leave pending in one step.
# An account may have hundreds of thousands: neither server then makes others wait for more than some milliseconds.
_IDS_AT_ONCE, _GONE_AT_ONCE = 2_000, 1_000
# A token ends with milliseconds since the epoch.
_BEGIN_DIGITS = 13
_POLL_MS = 20

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


def take_lease(context: Context, lease: str, *, unless_cached: str | None = None) -> Effects[bytes]:
    """Take the right to cache later reads from Postgres; return its token, empty if that key has a fresh text."""
    ttl_ms = context.settings.load_lease_ttl_ms
    request = calls.lease(lease, _fresh_token(context), ttl_ms, unless_cached=unless_cached)
    token: bytes = yield from run_script(request)
    return token


def gated(context: Context, user_id: str, request: Call, *, once: bytes | None = None) -> Effects[Any]:
    """Run a script that needs the balance; load the balance if it is not cached, or stale.

    An answer of `once` is also worth a load, but no second one.
    Raises LedgerUnavailable if Postgres does not answer, and no balance is known that may answer instead.
    """
    worth_a_load = {b"load", b"stale", once}

    def load(answer: bytes, shortest_life_ms: int) -> Effects[bool] | None:
        if answer not in worth_a_load:
            return None
        worth_a_load.discard(once)
        if answer == b"stale" and context.settings.ledger_down_balance_max_age_seconds:
            return _load_or_reuse(context, user_id, shortest_life_ms)
        return _load_in_turn(context, user_id, shortest_life_ms, replaces=answer == once)

    return (yield from run_loading(context, request, load, f"the balance of {user_id}"))


def _load_or_reuse(context: Context, user_id: str, shortest_life_ms: int) -> Effects[bool]:
    """Load a balance; if Postgres does not answer, let the last known one answer for `ledger_down_pause_ms`.

    After a failure one call for each pause tries Postgres, and the others do not wait for it. What is pending counts
    against the last known balance as against any other, and a publish replaces it.
    """
    if context.ledger_breaker.lets_through():
        try:
            was_late = yield from _load_in_turn(context, user_id, shortest_life_ms)
        except LedgerUnavailable as error:
            context.ledger_breaker.failed(error)
            logger.warning("Postgres is down, answering from the last known balances: %s", error)
        else:
            context.ledger_breaker.answered()
            return was_late
    yield from run_script(calls.reuse(context.account(user_id).balance, context.settings.ledger_down_pause_ms))
    return False  # if the last known one is gone by now, the next load says that Postgres does not answer


def _load_in_turn(context: Context, user_id: str, shortest_life_ms: int, *, replaces: bool = False) -> Effects[bool]:
    """Load a balance, unless somebody else in this process just did. See `_load`.

    The lease is taken after the turn has come: however long that takes, it does not end before Postgres answers.
    """
    turn: Turn | None = yield LoadTurn(user_id)
    if turn is None:
        return False
    try:
        return (yield from _load(context, user_id, shortest_life_ms, replaces=replaces))
    except LedgerUnavailable as error:
        turn.end(error)
        raise
    finally:
        turn.end(None)


def _load(context: Context, user_id: str, shortest_life_ms: int, *, replaces: bool) -> Effects[bool]:
    """Read a balance from Postgres and cache it; return True if its life was over before it came.

    Unless it `replaces` a fresh one, there is nothing to do once another process has cached it.
    If a publish or a boundary came in between, it is not cached, and the caller retries; likewise after another process
    has loaded it. Events that the balance contains leave pending in the same step. Holds that the ledger granted while
    Redis was down become holds here.
    """
    keys = context.account(user_id)
    token = yield from take_lease(context, keys.lease, unless_cached=None if replaces else keys.balance)
    if not token:
        return False
    if not token.startswith(context.loader.encode()) and (yield from _other_loads(context, keys.lease, token)):
        return False
    view = yield Ask(lambda ledger: ledger.account(user_id))
    account: Account | None = view.account
    if account is not None and account.user_id != user_id:
        # Whatever it comes from, a balance that is cached under another name would be spent by the wrong user.
        raise LedgerUnavailable(f"Postgres answered about another account than {user_id}")
    gone: list[Gone] = []
    if account is None:
        text, life = unknown_account_text(view.epoch), CacheLife(context.settings.cache_ttl_ms, 0)
    else:
        text = cache_text(view.epoch, account)
        life = cache_life(account, view.now, context.settings)
        token, gone = yield from _take_out(context, keys, account, token)
        if not token:
            return False
    installed = yield from run_script(
        calls.install(
            keys.partition, keys.balance, keys.lease, token, text,
            ttl_ms=life.fresh_ms, shortest_life_ms=shortest_life_ms, kept_ms=life.kept_ms, gone=gone,
            version_key=keys.version,
        )
    )  # fmt: skip
    require_current(installed)
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


def _other_loads(context: Context, lease: str, token: bytes) -> Effects[bool]:
    """Wait while another process loads the balance under this lease; return False if it takes too long, or has died."""
    for _ in range(context.settings.load_other_wait_ms // _POLL_MS):
        yield Pause(_POLL_MS / 1_000)
        found: bytes = (yield Command(("GET", lease), short=True)) or b""
        # A load that takes many ids out changes its token; the process and the begin in it stay.
        if (found[: len(context.loader)], found[-_BEGIN_DIGITS:]) != (
            token[: len(context.loader)],
            token[-_BEGIN_DIGITS:],
        ):
            return True
    return False


def _take_out(context: Context, keys: AccountKeys, account: Account, token: bytes) -> Effects[tuple[bytes, list[Gone]]]:
    """Find the pending events that the balance contains; take them out but for the last ones of each pending map.

    Returns these, for the step that caches the balance, and the token that it needs; an empty one if the lease is gone.
    No step takes longer if there are more ids. Killed in between, the next load does the rest.
    """
    names = [keys.pending(name) for meter in account.balances for name in (meter, *context.sub_meters(meter))]
    last: list[Gone] = []
    lengths = (yield Pipeline(tuple(("HLEN", name) for name in names), short=True)) if names else []
    for name, length in zip(names, lengths, strict=True):
        gone: set[str] = set()
        cursor: Any = b"0"
        while length:  # 0 after the last part of the map
            if isinstance(length, Exception):
                raise length
            try:
                if length <= _IDS_AT_ONCE:
                    ids, length = (yield Command(("HKEYS", name), short=True)), 0
                else:
                    cursor, part = yield Command(("HSCAN", name, cursor, "COUNT", _IDS_AT_ONCE), short=True)
                    ids, length = part[0::2], length if int(cursor) else 0
            except redis_errors.NoPermissionError:  # an operator, or a service under an earlier config/redis.acl
                ids, length = (yield Command(("HKEYS", name), short=True)), 0
            # However many ids are not contained, the load has its time: it would else begin again, and never end.
            yield Command(("PEXPIRE", keys.lease, context.settings.load_lease_ttl_ms), short=True)
            if events := [raw[2:].decode() for raw in ids if raw.startswith(b"e:")]:
                gone |= yield Ask(partial(_contained_of, keys.user_id, events, account.version))
            while len(gone) > _GONE_AT_ONCE:
                ids = [f"e:{gone.pop()}" for _ in range(_GONE_AT_ONCE)]
                fresh, ttl_ms = _fresh_token(context), context.settings.load_lease_ttl_ms
                token = (yield from run_script(calls.shed(keys, token, fresh, (name, ids), ttl_ms=ttl_ms))) or b""
                if not token:
                    return token, []
        if gone:
            last.append((name, [f"e:{event_id}" for event_id in gone]))
    return token, last


def _contained_of(user_id: str, events: Sequence[str], version: int, ledger: LedgerView) -> set[str]:
    return ledger.contained(user_id, events, version)


def _fresh_token(context: Context) -> str:
    return context.loader + token_hex(4)


def require_current(installed: Any) -> None:
    """Raise LedgerUnavailable if what was read is older than what workers have published."""
    if installed == b"old":
        raise LedgerUnavailable(
            "DATABASE_URL: names a standby or a copy that is behind the ledger; name the primary. After a restore of "
            "the ledger, run `meterfall cache reset`"
        )


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
