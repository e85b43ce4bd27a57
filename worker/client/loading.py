"""Loads of balances from Postgres that a script does not find cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

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
    Undo,
    as_down,
    logger,
    run_script,
    run_scripts,
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
from worker.rules.account import EventsAsked

if TYPE_CHECKING:
    from worker.client.ledger import AccountView, LedgerView
    from worker.ledger.holds import LedgerHold

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


def run_loading(context: Context, request: Call, load: Load, needed: str, undo: Undo | None = None) -> Effects[Any]:
    """Run a script; if it does not find a cached value, load the value and run the script again. `undo`: see `Command`.

    Raises RedisUnavailable if the value, named `needed`, changes faster than it can be loaded.
    """
    shortest_life_ms = 0
    for _ in range(_LOAD_ATTEMPTS):
        grants = context.let_through.grants
        reply = yield from run_script(request, undo)
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


def gated(
    context: Context,
    user_id: str,
    request: Call,
    *,
    once: bytes | None = None,
    undo: Undo | None = None,
) -> Effects[Any]:
    """Run a script that needs the balance; load the balance if it is not cached, or stale. `undo`: see `Command`.

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

    return (yield from run_loading(context, request, load, f"the balance of {user_id}", undo))


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
    """Load a balance, and those of other users whose calls wait, unless another call of this process does. See `_load`.

    The leases are taken after the turn has come: however long that takes, they do not end before Postgres answers.
    """
    step = LoadTurn(user_id, alone=replaces or shortest_life_ms > 0)
    error: LedgerUnavailable | None = None
    try:
        yield step
        return step.turn is not None and (yield from _load(context, step.turn, shortest_life_ms, replaces=replaces))
    except LedgerUnavailable as unavailable:
        error = unavailable
        raise
    finally:
        if step.turn is not None:
            try:
                step.turn.end(error)
            except BaseException:  # interrupted: the calls that wait for it must not wait in vain
                step.turn.end(error)
                raise


def _load(context: Context, turn: Turn, shortest_life_ms: int, *, replaces: bool) -> Effects[bool]:
    """Read balances from Postgres and cache them; return True if the life of the call's own was over before it came.

    Unless it `replaces` a fresh one, there is nothing to do once another process has cached it. If another process
    loads a balance, the load waits for that; the other balances do not.
    If a publish or a boundary came in between, a balance is not cached, and its callers retry; likewise after another
    process has loaded it. Events that a balance contains leave pending in the same step. Holds that the ledger granted
    while Redis was down become holds here.
    """
    own = turn.users[0]
    leases = yield from _take_leases(context, turn, replaces=replaces)
    others = {user_id: token for user_id, token in leases.items() if not token.startswith(context.loader.encode())}
    mine = {user_id: token for user_id, token in leases.items() if user_id not in others}
    if own not in others:
        turn.hand_over(others)
        return (yield from _load_leased(context, turn, mine, shortest_life_ms))
    yield from _load_leased(context, turn, mine, 0)
    turn.keep_only(others)
    late = yield from _other_loads(context, turn, others)
    return own in late and (yield from _load_leased(context, turn, late, shortest_life_ms))


def _take_leases(context: Context, turn: Turn, *, replaces: bool) -> Effects[dict[str, bytes]]:
    """Take the leases of a turn; return their tokens by user, without users whose fresh balance is cached."""
    accounts = [context.account(user_id) for user_id in turn.users]
    ttl_ms = context.settings.load_lease_ttl_ms
    tokens = yield from _run_each(
        [
            calls.lease(
                keys.lease, _fresh_token(context), ttl_ms, unless_cached=None if replaces else keys.balance
            )
            for keys in accounts
        ]
    )  # fmt: skip
    found = dict(zip(turn.users, tokens, strict=True))
    failed = _set_apart(turn, found)
    return {user_id: token for user_id, token in found.items() if token and user_id not in failed}


def _run_each(requests: Sequence[Call]) -> Effects[list[Any]]:
    """Run scripts together; return their replies, errors among them, even if there is only one."""
    try:
        return (yield from run_scripts(requests))
    except redis_errors.ResponseError as error:
        if len(requests) > 1:
            raise
        return [error]


def _set_apart(turn: Turn, replies: Mapping[str, Any]) -> set[str]:
    """Let each user whose reply is an error be loaded alone: only its own calls fail. Returns these users.

    Raises the error of the call's own user.
    """
    failed = {user_id for user_id, reply in replies.items() if isinstance(reply, Exception)}
    own = turn.users[0]
    for user_id in failed - {own}:
        turn.hand_over([user_id])
    if own in failed:
        raise as_down(replies[own])
    return failed


def _other_loads(context: Context, turn: Turn, tokens: Mapping[str, bytes]) -> Effects[dict[str, bytes]]:
    """Wait while other processes load the balances of a turn under these leases.

    Returns the leases of those that take too long, or have died. Once the call's own is loaded, another call waits for
    the others.
    """
    own, waited_ms = turn.users[0], turn.waited_ms
    left = dict(tokens)
    while waited_ms + _POLL_MS <= context.settings.load_other_wait_ms:
        yield Pause(_POLL_MS / 1_000)
        waited_ms += _POLL_MS
        leases = yield Pipeline(tuple(("GET", context.account(user_id).lease) for user_id in left), short=True)
        found = dict(zip(left, leases, strict=True))
        failed = _set_apart(turn, found)
        left = {
            user_id: token
            for user_id, token in left.items()
            if user_id not in failed and _is_same_load(context, found[user_id] or b"", token)
        }
        if own not in left:
            turn.hand_over(left, waited_ms)
            return {}
    return left


def _is_same_load(context: Context, found: bytes, token: bytes) -> bool:
    """Return True if a lease is still that of the load with this token.

    A load that takes many ids out changes its token; the process and the begin in it stay.
    """
    process = len(context.loader)
    return (found[:process], found[-_BEGIN_DIGITS:]) == (token[:process], token[-_BEGIN_DIGITS:])


class _Leased(NamedTuple):
    """A balance that was read under a lease, and how many ids each of its pending maps has."""

    keys: AccountKeys
    token: bytes
    view: AccountView
    pending: Mapping[str, int]

    @property
    def user_id(self) -> str:
        """The user of the balance."""
        return self.keys.user_id

    @property
    def ids(self) -> int:
        """How many ids are pending against the balance."""
        return sum(self.pending.values())


def _load_leased(context: Context, turn: Turn, tokens: Mapping[str, bytes], shortest_life_ms: int) -> Effects[bool]:
    """Load balances of a turn under their leases; return True if the life of the call's own was over before it came.

    An account with many pending ids is loaded alone, after the others.
    """
    if not tokens:
        return False
    own = turn.users[0]
    read = yield from _read_accounts(context, turn, tokens)
    was_late = False
    for part in _parts([each for each in read if each.ids <= _GONE_AT_ONCE]):
        gone = yield from _find_contained(turn, part)
        was_late |= yield from _install(context, turn, part, gone, shortest_life_ms)
        turn.done([each.user_id for each in part if each.user_id != own])
    many = {each.user_id: each for each in read if each.ids > _GONE_AT_ONCE}
    for user_id in many.keys() - {own}:
        turn.hand_over([user_id])
    if own in many:
        turn.keep_only([own])
        leased = many[own]
        token, contained = yield from _take_out(context, leased)
        if token:
            leased = leased._replace(token=token)
            was_late = yield from _install(context, turn, [leased], {own: contained}, shortest_life_ms)
    return was_late


def _parts(read: Sequence[_Leased]) -> Iterator[list[_Leased]]:
    """Split balances so that no part has more pending ids than one question to Postgres may name."""
    part: list[_Leased] = []
    ids = 0
    for each in read:
        if part and ids + each.ids > _IDS_AT_ONCE:
            yield part
            part, ids = [], 0
        part.append(each)
        ids += each.ids
    if part:
        yield part


def _read_accounts(context: Context, turn: Turn, tokens: Mapping[str, bytes]) -> Effects[list[_Leased]]:
    """Read balances from Postgres, and then from Redis how many ids are pending against each."""
    views: dict[str, AccountView] = yield Ask(lambda ledger: ledger.account_views(list(tokens)))
    maps: dict[str, list[str]] = {}
    for user_id in tokens:
        account = views[user_id].account
        if account is not None and account.user_id != user_id:
            # Whatever it comes from, a balance that is cached under another name would be spent by the wrong user.
            raise LedgerUnavailable(f"Postgres answered about another account than {user_id}")
        keys, meters = context.account(user_id), () if account is None else account.balances
        maps[user_id] = [keys.pending(name) for meter in meters for name in (meter, *context.sub_meters(meter))]
    found = yield from _ask_maps(turn, "HLEN", maps)
    return [
        _Leased(context.account(user_id), tokens[user_id], views[user_id], lengths)
        for user_id, lengths in found.items()
    ]


def _ask_maps(turn: Turn, command: str, maps: Mapping[str, Sequence[str]]) -> Effects[dict[str, dict[str, Any]]]:
    """Return by user what the command says of each pending map. A user with an error is set apart."""
    commands = tuple((command, name) for names in maps.values() for name in names)
    replies = iter((yield Pipeline(commands, short=True)) if commands else ())
    found = {user_id: {name: next(replies) for name in names} for user_id, names in maps.items()}
    errors = {
        user_id: next((reply for reply in answers.values() if isinstance(reply, Exception)), None)
        for user_id, answers in found.items()
    }
    failed = _set_apart(turn, errors)
    return {user_id: answers for user_id, answers in found.items() if user_id not in failed}


def _find_contained(turn: Turn, part: Sequence[_Leased]) -> Effects[dict[str, list[Gone]]]:
    """Find the pending events that the balances contain, by user; a user with an error is set apart, and missing."""
    maps = {each.user_id: [name for name, length in each.pending.items() if length] for each in part}
    found = yield from _ask_maps(turn, "HKEYS", maps)
    events = {user_id: {name: _events_in(ids) for name, ids in answers.items()} for user_id, answers in found.items()}
    asked = [
        EventsAsked(each.user_id, each.view.account.version, [*chain(*events[each.user_id].values())])
        for each in part
        if each.view.account is not None and any(events.get(each.user_id, {}).values())
    ]
    contained = (yield Ask(lambda ledger: ledger.contained(asked))) if asked else {}
    return {
        user_id: [
            (name, [f"e:{event_id}" for event_id in ids if event_id in contained[user_id]])
            for name, ids in by_map.items()
            if ids
        ]
        for user_id, by_map in events.items()
    }


def _events_in(ids: Iterable[bytes]) -> list[str]:
    """Return the events among the ids of a pending map."""
    return [raw[2:].decode() for raw in ids if raw.startswith(b"e:")]


def _install(
    context: Context,
    turn: Turn,
    part: Sequence[_Leased],
    gone: Mapping[str, list[Gone]],
    shortest_life_ms: int,
) -> Effects[bool]:
    """Cache balances, each with the ids in `gone` leaving pending in the same step; then take over the ledger's holds.

    Leaves out users that `gone` lacks. Returns True if the life of the call's own was over before it came.
    """
    part = [each for each in part if each.user_id in gone]
    if not part:
        return False
    requests = [_install_call(context, each, gone[each.user_id], shortest_life_ms) for each in part]
    replies = dict(zip([each.user_id for each in part], (yield from _run_each(requests)), strict=True))
    yield from _take_over_holds(
        context, [each for each in part if each.view.holds and replies[each.user_id] in (0, 1, b"late")]
    )
    own = turn.users[0]
    for user_id, reply in replies.items():
        try:
            require_current(reply)
        except LedgerUnavailable as error:
            if user_id == own:
                turn.keep_only([own])  # the others need not fail with it
                raise
            turn.done([user_id], error)
    _set_apart(turn, replies)
    return bool(replies.get(own) == b"late")


def _install_call(context: Context, leased: _Leased, gone: Sequence[Gone], shortest_life_ms: int) -> Call:
    keys, view = leased.keys, leased.view
    if view.account is None:
        text, life = unknown_account_text(view.epoch), CacheLife(context.settings.cache_ttl_ms, 0)
    else:
        text = cache_text(view.epoch, view.account)
        life = cache_life(view.account, view.now, context.settings)
    return calls.install(
        keys.partition, keys.balance, keys.lease, leased.token, text,
        ttl_ms=life.fresh_ms, shortest_life_ms=shortest_life_ms, kept_ms=life.kept_ms, gone=gone,
        version_key=keys.version,
    )  # fmt: skip


def _take_over_holds(context: Context, read: Sequence[_Leased]) -> Effects[None]:
    """Make the holds that the ledger granted while Redis was down holds of Redis, and delete them from the ledger.

    A hold that Redis refuses stays in the ledger: the next load finds it again.
    """
    holds = [(each, hold) for each in read for hold in each.view.holds]
    if not holds:
        return
    requests = [_hold_call(context, each, hold) for each, hold in holds]
    taken: dict[str, list[str]] = {}
    for (each, hold), reply in zip(holds, (yield from _run_each(requests)), strict=True):
        if isinstance(reply, Exception):
            who = name_in_logs(each.user_id, context.settings.log_user_ids)
            logger.warning("a hold of %s stays in the ledger: %s", who, reply)
        else:
            taken.setdefault(each.user_id, []).append(hold.key)
    yield from forget_ledger_holds(context, taken)


def _hold_call(context: Context, leased: _Leased, hold: LedgerHold) -> Call:
    """Make the hold one of the call that made it: no other gives it back. One that several calls have is nobody's."""
    ttl = max(1, int((hold.expires_at - leased.view.now).total_seconds()))
    return calls.reserve(
        leased.keys, hold.meter, hold.amount, hold.key, sub_meter=context.sub_meter(hold.meter, hold.backend),
        ttl_ms=ttl * 1_000, outcome_ttl_ms=context.outcome_ttl_ms, unchecked=True,
        call_id=hold.call_id or context.new_call_id(),
    )  # fmt: skip


def _take_out(context: Context, leased: _Leased) -> Effects[tuple[bytes, list[Gone]]]:
    """Find the pending events that the balance contains; take them out but for the last ones of each pending map.

    Returns these, for the step that caches the balance, and the token that it needs; an empty one if the lease is gone.
    No step takes longer if there are more ids. Killed in between, the next load does the rest.
    """
    keys, token, view, pending = leased
    assert view.account is not None
    version = view.account.version
    last: list[Gone] = []
    for name, length in pending.items():
        gone: set[str] = set()
        cursor: Any = b"0"
        while length:  # 0 after the last part of the map
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
            if events := _events_in(ids):
                gone |= yield Ask(partial(_contained_of, EventsAsked(keys.user_id, version, events)))
            while len(gone) > _GONE_AT_ONCE:
                ids = [f"e:{gone.pop()}" for _ in range(_GONE_AT_ONCE)]
                fresh, ttl_ms = _fresh_token(context), context.settings.load_lease_ttl_ms
                token = (yield from run_script(calls.shed(keys, token, fresh, (name, ids), ttl_ms=ttl_ms))) or b""
                if not token:
                    return token, []
        if gone:
            last.append((name, [f"e:{event_id}" for event_id in gone]))
    return token, last


def _contained_of(asked: EventsAsked, ledger: LedgerView) -> set[str]:
    return ledger.contained([asked])[asked.user_id]


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


def forget_ledger_holds(context: Context, holds: Mapping[str, Sequence[str]]) -> Effects[None]:
    """Delete holds by user and key that Redis has taken over. If this fails, the next load finds them again."""
    if not holds:
        return

    def forget(ledger: LedgerView) -> None:
        for user_id, hold_keys in holds.items():
            ledger.forget_holds(user_id, hold_keys)

    try:
        yield Ask(forget)
    except LedgerUnavailable as error:
        who = ", ".join(name_in_logs(user_id, context.settings.log_user_ids) for user_id in holds)
        logger.warning("holds of %s stay in the ledger until they expire: %s", who, error)
