"""Call the scripts: one function for each, which orders its keys and arguments.

No other module knows these orders. Amounts are whole units: of the meter, after the multiplier, or of the pool. A
script does all that it does in one step, and may be repeated: ids are added and removed, never counted, so that a lost
reply changes nothing. The functions make a call; they send nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from schemas.events import MAX_ENTRY_BYTES, MAX_ENTRY_FIELDS, MAX_PAYLOAD_BYTES
from worker.keyspace.keys import RING_TTL_MS, SPONSORSHIP, AccountKeys, Stream
from worker.keyspace.scripts import Call, call
from worker.rules.sponsorship import DAY_MS

_Args = list[str | int | bytes]


class MarkedEvent(NamedTuple):
    """An event that a script appends and counts as pending.

    It counts on `meter` and, where a plan caps that for the event's backend, on `sub_meter`. `payload` is the event as
    it travels, `signature` its signature, '' where it has none.
    """

    account: AccountKeys
    meter: str
    sub_meter: str | None
    event_id: str
    amount: int
    payload: bytes
    signature: str


# Typed ids (`h:<key>`, `e:<event id>`, `g:<request>`) that leave a pending map, after the map's key.
Gone = tuple[str, Sequence[str]]


class Publication(NamedTuple):
    """A cached text that becomes visible under `key`, and the ids that it contains.

    It lives until `ends_ms` on the clock of Redis. Without a text, the next reader must load it.
    """

    key: str
    lease_key: str
    gone: Sequence[Gone] = ()
    text: str = ""
    ends_ms: int = 0


class InHand(NamedTuple):
    """The range that a drain takes: `size` entries from the entry `first` on.

    `first` is '-' for the beginning of the stream. `deaths` workers died while `first` was applied alone.
    """

    first: str
    size: int
    deaths: int


# ---------------------------------------------------------------------------------------------------------------------
# Accounts


def check(account: AccountKeys, meter: str, amount: int, sub_meters: Sequence[str]) -> Call:
    """Ask whether `amount` units fit, on the meter and on each sub-meter.

    Changes nothing, apart from taking expired holds out. Replies with the answer of the gate (see `gate` in
    common.lua), or ['load'] where the balance is not cached.
    """
    return call("check", [*_gate(account, meter), *_maps(account, sub_meters)], [meter, amount, *sub_meters])


def reserve(
    account: AccountKeys,
    meter: str,
    amount: int,
    key: str,
    *,
    sub_meter: str | None,
    ttl_ms: int,
    outcome_ttl_ms: int,
    unchecked: bool = False,
    multiplier: str = "",
) -> Call:
    """Check, and set `amount` units aside under `key` for `ttl_ms`.

    With `unchecked`, whatever the balance. Once the hold is closed, its outcome is remembered for `outcome_ttl_ms`.
    The hold remembers the `multiplier` that made the amount, '' where the amount came without one.
    Replies ['held', amount, left, expires ms], also to a repeat; ['conflict', meter, amount, sub-meter or ''] where the
    key holds something else; ['closed', state]; the answer of the gate that denied; or ['load']. The first two end with
    the multiplier of the hold, if it has one.
    """
    names = [*_gate(account, meter), account.hold(key), account.partition.expiries]
    args: _Args = [meter, amount, key, ttl_ms, outcome_ttl_ms, account.expiring(meter), "1" if unchecked else ""]
    args.append(multiplier)
    if sub_meter is not None:
        names += (account.pending(sub_meter), account.holds(sub_meter))
        args += (account.expiring(sub_meter), sub_meter)
    return call("reserve", names, args)


def extend(
    account: AccountKeys,
    meter: str,
    key: str,
    sub_meters: Iterable[str],
    *,
    ttl_ms: int | None,
    amount: int | None,
    outcome_ttl_ms: int,
    unchecked: bool = False,
) -> Call:
    """Let the open hold `key` end `ttl_ms` from now, and count for `amount` units in all; None: as it is.

    Only the units that come on top are checked; with `unchecked`, none are. `sub_meters`: as in `capture`.
    Replies ['held', amount, left, expires ms, sub-meter or '', multiplier or '']; ['closed', state]; ['missing'] where
    nothing is known of the hold; ['conflict', meter, amount, sub-meter or ''] where it is on another meter, or on a
    sub-meter that is not among `sub_meters`; ['refused', more, sub-meter or '', then the answer of the gate that denied
    so many more]; or ['load'].
    """
    sub_meters = list(sub_meters)
    names = [*_gate(account, meter), account.hold(key), account.partition.expiries, *_maps(account, sub_meters)]
    args: _Args = [meter, "" if amount is None else amount, key, "" if ttl_ms is None else ttl_ms, outcome_ttl_ms]
    args += (account.expiring(meter), "1" if unchecked else "")
    for sub_meter in sub_meters:
        args += (sub_meter, account.expiring(sub_meter))
    return call("extend", names, args)


def charge(event: MarkedEvent, *, outcome_ttl_ms: int) -> Call:
    """Check, count the event as pending and append it; a denial leaves no trace.

    A repeat within `outcome_ttl_ms` gets the first answer.
    Replies ['charged', limit, used, rollover, purchased, spill, pending before, repeated, must ring];
    ['conflict', meter, amount] where the id was charged with another amount; the answer of the gate that denied; or
    ['load'].
    """
    account, meter = event.account, event.meter
    names = [*_gate(account, meter), account.charge(event.event_id), *_ringing(account.partition)]
    args: _Args = [meter, event.amount, event.event_id, event.payload, event.signature, RING_TTL_MS, outcome_ttl_ms]
    if event.sub_meter is not None:
        names += (account.pending(event.sub_meter), account.holds(event.sub_meter))
        args.append(event.sub_meter)
    return call("charge", names, args)


def emit(events: Sequence[MarkedEvent]) -> Call:
    """Count events as pending and append them to their stream, in order.

    At least one event, and all of one partition. Replies 1 when the bell must ring.
    """
    names = _ringing(events[0].account.partition)
    args: _Args = [RING_TTL_MS]
    for account, meter, sub_meter, event_id, amount, payload, signature in events:
        names.append(account.pending(meter))
        args += (event_id, amount, payload, signature)
        if sub_meter is not None:
            names.append(account.pending(sub_meter))
            args += (event_id, amount, "", "")  # only counted: it is appended once
    return call("emit", names, args)


def capture(event: MarkedEvent, key: str, sub_meters: Iterable[str], *, outcome_ttl_ms: int) -> Call:
    """Turn a part of the hold `key` into the event; the rest stays held.

    The event counts in full, even if it is more than was left. `sub_meters` are all that plans have on the meter: the
    hold may count against any of them.
    Replies [state, amount captured, repeated, must ring]; ['conflict', amount] where the event id was captured with
    another amount.
    """
    account = event.account
    names = [account.pending(event.meter), account.hold(key), *_ringing(account.partition)]
    args: _Args = [key, event.event_id, event.amount, event.payload, event.signature, RING_TTL_MS, outcome_ttl_ms]
    for sub_meter in sub_meters:
        names.append(account.pending(sub_meter))
        if sub_meter == event.sub_meter:
            args.append(len(names))
    return call("capture", names, args)


def settle(event: MarkedEvent, key: str, sub_meters: Iterable[str], *, outcome_ttl_ms: int) -> Call:
    """Turn the hold `key` into the event; what is left of it is free again.

    Always records, also without a hold: the work was done. `sub_meters`: as in `capture`.
    Replies [state before, event id, amount, repeated, must ring, meter of the hold or ''].
    """
    account, meter = event.account, event.meter
    names = [account.pending(meter), account.holds(meter), account.hold(key), *_ringing(account.partition)]
    args: _Args = [key, event.event_id, event.amount, event.payload, event.signature, RING_TTL_MS, outcome_ttl_ms]
    for sub_meter in sub_meters:
        names.append(account.pending(sub_meter))
        if sub_meter == event.sub_meter:
            args.append(len(names))
        names.append(account.holds(sub_meter))
    return call("settle", names, args)


def release(
    account: AccountKeys, meter: str, key: str, sub_meters: Iterable[str], *, outcome_ttl_ms: int, late: bool = False
) -> Call:
    """Give the hold `key` back and close the key: no late reserve can revive it.

    A `late` release leaves alone a hold that was reserved again since, and a key that nothing is known of.
    `sub_meters`: as in `capture`. Replies [state before, meter or '', amount first held, amount given back].
    """
    names = [account.pending(meter), account.holds(meter), account.hold(key), *_maps(account, sub_meters)]
    return call("release", names, [key, outcome_ttl_ms, int(late)])


def close(
    account: AccountKeys,
    meter: str,
    key: str,
    sub_meters: Iterable[str],
    *,
    event_id: str,
    amount: int,
    outcome_ttl_ms: int,
) -> Call:
    """Close the hold `key`, which an event from a plain XADD named that was applied.

    Its id has left pending with the publish before. `sub_meters`: as in `capture`.
    Replies with the meter of the hold, '' when nothing is known of it.
    """
    names = [account.holds(meter), account.hold(key), *(account.holds(sub_meter) for sub_meter in sub_meters)]
    return call("close", names, [key, event_id, amount, outcome_ttl_ms])


# ---------------------------------------------------------------------------------------------------------------------
# What is cached of the ledger: balances, the pool, standings


def lease(key: str, token: str, ttl_ms: int) -> Call:
    """Take the right to install what is read from Postgres from now on.

    `token` is a fresh one. Loaders at the same time share one lease; a publish ends it for all.
    Replies with the token in force, which `install` wants.
    """
    return call("lease", [key], [token, ttl_ms])


def install(
    key: str, lease_key: str, token: bytes, text: str, *, ttl_ms: int, shortest_life_ms: int, gone: Iterable[Gone] = ()
) -> Call:
    """Cache a text from Postgres, unless a newer one was published meanwhile.

    `token` is the one that `lease` replied with: once that lease is gone, nothing is installed. Ids that the text
    contains leave pending in the same step. It lives for `ttl_ms` from the moment at which the lease was taken, but at
    least for `shortest_life_ms` from now. Replies 1 when it was installed, else 0; 'late' when its time was over before
    it came.
    """
    names: list[str] = [key, lease_key]
    args: _Args = [token, text, ttl_ms, shortest_life_ms]
    _leave(names, args, gone)
    return call("install", names, args)


def publish(stream: Stream, minute: int, entries: Sequence[str], publications: Sequence[Publication]) -> Call:
    """Show a commit: texts appear, ids leave pending, entries leave the stream.

    A text replaces an older one, never a newer one. Where none is cached, only ids are removed; a loader's lease is
    gone. `minute`, since the epoch, is the one in which the entries count as applied.
    Replies with the number of entries deleted.
    """
    names = [stream.entries, stream.applied(minute)]
    args: _Args = [len(entries), *entries, len(publications)]
    for key, lease_key, gone, text, ends_ms in publications:
        names += (key, lease_key)
        args += (text, ends_ms, len(gone))
        _leave(names, args, gone)
    return call("publish", names, args)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def extent(stream: Stream, start: str, max_entries: int, max_bytes: int) -> Call:
    """Ask how far the stream may be read at once from the entry `start` on.

    That is bounded in entries and in bytes, whatever producers put there.
    Replies ['none']; ['all', last id] when the whole stream fits; ['part', id, bytes, more]; ['few', entries, bytes,
    more], the entries themselves; or ['cut', id, bytes, text] where the first entry is larger than any event may be.
    """
    limits = (MAX_ENTRY_BYTES, MAX_ENTRY_FIELDS, MAX_PAYLOAD_BYTES)
    return call("extent", [stream.entries], [start, max_entries, max_bytes, *limits])


def hand(stream: Stream, token: str, grace_ms: int, taken: InHand | None = None) -> Call:
    """Note the range that a drain takes in hand, and that its owner lives.

    It counts as alive for `grace_ms`. Without `taken` the note stands as it is. Replies with the time (ms): what is
    read from Postgres from now on is not older. 0 when the note to keep is another's: another drain has taken over.
    """
    return call("hand", [stream.hand, stream.busy], [token, grace_ms, *(taken or ())])


def done(stream: Stream, token: str) -> Call:
    """Take the marker of a drain back that did not die.

    Replies with the number of entries in the stream, -1 when the marker is another's.
    """
    return call("done", [stream.hand, stream.busy, stream.entries], [token])


def recent(
    stream: Stream, entries: int, *, tolerated: int, unreadable: int, least: int, percent: int, window_ms: int
) -> Call:
    """Ask whether too many of the latest entries of a stream are no events.

    `entries` of a batch are in the stream still: the first `tolerated` of them do not count, `unreadable` of the others
    are no events. `percent` of at least `least` entries are too many. A window lives for `window_ms`.
    Replies [entries, no events] when there are too many, else nil.
    """
    args = [entries, tolerated, unreadable, least, percent, window_ms]
    return call("recent", [stream.entries, stream.recent], args)


def forget(stream: Stream, last_id: str) -> Call:
    """Delete a stream whose entries were moved elsewhere, up to `last_id`.

    Replies 1 when it is gone, 0 when there are entries after that one.
    """
    return call("forget", [stream.entries], [last_id])


def expire(stream: Stream, member: str) -> Call:
    """Take expired holds out of the maps that a member of `expiries` stands for.

    Notes when to look again.
    """
    return call("expire", [*stream.maps_of_expiring(member), stream.expiries], [member])


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool

# How much of what is wanted `sponsor_decide` holds: nothing, all or nothing, or what fits.
Mode = Literal["advise", "all", "most"]


def sponsor_decide(
    mode: Mode,
    user_id: str,
    request_id: str,
    *,
    wanted: int,
    estimate: int,
    paid: int,
    ttl_ms: int,
    outcome_ttl_ms: int,
    tier: str,
    daily_budgets: Mapping[str, int],
) -> Call:
    """Ask what the pool covers of the `wanted` units of a request, and hold that.

    The mode says how much it holds, for `ttl_ms`. `estimate` and `paid` are what the hold remembers. `tier` is the
    trust tier that the host says, '' for the account's own. `daily_budgets` are the units of each, the lowest first.
    Replies ['held' or 'advice', tier, daily budget, taken of the window before, left of the pool before, held, expires
    ms, repeated]; ['conflict', user, held]; ['closed', state]; ['load'] for the standing or ['load_pool'].
    """
    names = _pool_and(user_id)
    if mode != "advise":
        names += (SPONSORSHIP.hold(request_id), SPONSORSHIP.expiries)
    args: _Args = [mode, user_id, request_id, wanted, estimate, paid, ttl_ms, outcome_ttl_ms, DAY_MS, tier]
    args += (SPONSORSHIP.expiring(), SPONSORSHIP.expiring(user_id), *_pairs(daily_budgets))
    return call("sponsor_decide", names, args)


def sponsor_settle(
    user_id: str,
    request_id: str,
    *,
    actual: int,
    paid: int | None,
    outcome_ttl_ms: int,
    tier: str,
    daily_budgets: Mapping[str, int],
) -> Call:
    """Say that a request cost `actual` units; the pool pays its part of what was held.

    The user paid `paid` of them (None: as many as the hold says). The rest of the hold is free again. `tier`: as in
    `sponsor_decide`, or '?' where the host was not asked yet.
    Replies ['settled', held, actual, paid, absorbed, late, repeated, must ring]; ['conflict', user, held]; ['closed',
    state]; and for a late one ['tier'], ['load'] or ['load_pool'], where it needs these.
    """
    names = [*_pool_and(user_id), SPONSORSHIP.hold(request_id), *_ringing(SPONSORSHIP)]
    args: _Args = [user_id, request_id, actual, "" if paid is None else paid, RING_TTL_MS, outcome_ttl_ms, DAY_MS, tier]
    return call("sponsor_settle", names, [*args, *_pairs(daily_budgets)])


def sponsor_release(user_id: str, request_id: str, reason: str, *, outcome_ttl_ms: int) -> Call:
    """Give a request's hold back to the pool and the user's window, and close its id.

    What has expired or was settled stays so. Replies [state before, held at first], or ['conflict', user, held].
    """
    names = [SPONSORSHIP.hold(request_id), SPONSORSHIP.promised, SPONSORSHIP.holds]
    names += (SPONSORSHIP.today(user_id), SPONSORSHIP.user_holds(user_id))
    return call("sponsor_release", names, [user_id, request_id, reason, outcome_ttl_ms])


def sponsor_credit(request_id: str, paid: int) -> Call:
    """Let a share of the `paid` units that a request brought in flow into the pool.

    A repeat is known when it is applied. Replies 1 when the bell must ring.
    """
    return call("sponsor_credit", _ringing(SPONSORSHIP), [request_id, paid, RING_TTL_MS])


# ---------------------------------------------------------------------------------------------------------------------
# Keys that several scripts take


def _gate(account: AccountKeys, meter: str) -> tuple[str, str, str]:
    """What the gate looks at: balance, pending, holds."""
    return account.balance, account.pending(meter), account.holds(meter)


def _maps(account: AccountKeys, sub_meters: Iterable[str]) -> list[str]:
    """Pending and holds of each of these sub-meters."""
    return [name(sub_meter) for sub_meter in sub_meters for name in (account.pending, account.holds)]


def _ringing(stream: Stream) -> list[str]:
    """What a script appends to, and how it knows whether the bell must ring."""
    return [stream.entries, stream.rung]


def _pool_and(user_id: str) -> list[str]:
    """What a script looks at to decide about a user."""
    names = [SPONSORSHIP.pool, SPONSORSHIP.promised, SPONSORSHIP.holds]
    return [*names, SPONSORSHIP.standing(user_id), SPONSORSHIP.today(user_id), SPONSORSHIP.user_holds(user_id)]


def _pairs(daily_budgets: Mapping[str, int]) -> list[str | int]:
    return [item for pair in daily_budgets.items() for item in pair]


def _leave(names: list[str], args: _Args, gone: Iterable[Gone]) -> None:
    """Add pending maps, and how many ids leave them and which."""
    for name, ids in gone:
        names.append(name)
        args += (len(ids), *ids)
