"""Call the scripts: one function for each, which orders its keys and arguments.

No other module knows these orders. Amounts are whole units: of the meter, after the multiplier, or of the pool. A
script does all that it does in one step, and may be repeated: ids are added and removed, never counted, so that a lost
reply changes nothing. The functions make a call; they send nothing.

A script that replies ['load'] where no balance is cached replies ['stale'] where the cached one is due for a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from schemas.events import MAX_ENTRY_BYTES, MAX_ENTRY_FIELDS, MAX_PAYLOAD_BYTES
from worker.keyspace.entries import follower_of
from worker.keyspace.keys import RING_TTL_MS, SPONSORSHIP, AccountKeys, Stream
from worker.keyspace.scripts import Call, call
from worker.rules.account import backend_of
from worker.rules.entry_times import CLOCK_SKEW_MS
from worker.rules.sponsorship import DAY_MS

_Args = list[str | int | bytes]

# For how long the counter of a minute is kept.
_APPLIED_MINUTES = 10


class MarkedEvent(NamedTuple):
    """An event that a script appends and counts as pending.

    It counts on `meter` and, where a plan caps that for the event's backend, on `sub_meter`. `payload` is the event as
    it travels, `signature` its signature, '' where it has none. `trace` is the
    `traceparent` that goes with it, unsigned, '' without one. Answers name `amount`, and a repeat has the same;
    `at_most` counts as pending, since fractions that the account carries may complete one more unit.
    """

    account: AccountKeys
    meter: str
    sub_meter: str | None
    event_id: str
    amount: int
    at_most: int
    payload: bytes
    signature: str
    trace: str = ""

    @property
    def stamps(self) -> str:
        """Signature, trace and capped backend as one argument of a script."""
        backend = "" if self.sub_meter is None else backend_of(self.sub_meter)
        return f"{self.signature} {self.trace} {backend}".rstrip()


# Typed ids (`h:<key>`, `e:<event id>`, `g:<request>`) that leave a pending map, after the map's key.
Gone = tuple[str, Sequence[str]]


class Publication(NamedTuple):
    """A cached text that becomes visible under `key`, and the ids that it contains.

    It lives until `ends_ms` on the clock of Redis. Without a text, the next reader must load it. The version of a text
    is remembered under `version_key` for longer.
    """

    key: str
    lease_key: str
    gone: Sequence[Gone] = ()
    text: str = ""
    ends_ms: int = 0
    version_key: str | None = None


class Note(NamedTuple):
    """The name of a note in the hand of the drain `token`; see `trim`."""

    token: str
    name: str


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
    names = [*_gate(account, meter), *_maps(account, sub_meters), account.partition.totals]
    return call("check", names, [meter, amount, *sub_meters])


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
    call_id: str = "",
) -> Call:
    """Check, and set `amount` units aside under `key` for `ttl_ms`.

    With `unchecked`, whatever the balance. Once the hold is closed, its outcome is remembered for `outcome_ttl_ms`.
    The hold remembers the `multiplier` that made the amount, '' where the amount came without one, and the call that
    made it: one with another `call_id` has reserved it again, but the same one was sent twice. '' is nobody's.
    Replies ['held', amount, left, expires ms], also to a repeat; ['conflict', meter, amount, sub-meter or ''] where the
    key holds something else; ['closed', state]; the answer of the gate that denied; or ['load']. The first two end with
    the multiplier of the hold, if it has one.
    """
    names = [*_gate(account, meter), account.hold(key), account.partition.expiries]
    args: _Args = [meter, amount, key, ttl_ms, outcome_ttl_ms, account.expiring(meter), "1" if unchecked else ""]
    args += (multiplier, call_id)
    if sub_meter is not None:
        names += (account.pending(sub_meter), account.holds(sub_meter))
        args += (account.expiring(sub_meter), sub_meter)
    names.append(account.partition.totals)
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
    names.append(account.partition.totals)
    args: _Args = [meter, "" if amount is None else amount, key, "" if ttl_ms is None else ttl_ms, outcome_ttl_ms]
    args += (account.expiring(meter), "1" if unchecked else "")
    for sub_meter in sub_meters:
        args += (sub_meter, account.expiring(sub_meter))
    return call("extend", names, args)


def charge(event: MarkedEvent, *, outcome_ttl_ms: int) -> Call:
    """Check, count the event as pending and append it; a denial leaves no trace.

    It must fit with its `at_most`. A repeat within `outcome_ttl_ms` gets the first answer; one that would be denied is
    known while the event waits.
    Replies ['charged', limit, used, rollover, purchased, spill, pending before, repeated, must ring];
    ['conflict', meter, amount] where the id was charged with another amount; the answer of the gate that denied; or
    ['load'].
    """
    account, meter = event.account, event.meter
    names = [*_gate(account, meter), account.charge(event.event_id), *_ringing(account.partition)]
    args: _Args = [meter, event.at_most, event.event_id, event.payload, event.stamps, RING_TTL_MS, outcome_ttl_ms]
    args.append(event.amount)
    if event.sub_meter is not None:
        names += (account.pending(event.sub_meter), account.holds(event.sub_meter))
        args.append(event.sub_meter)
    names.append(account.partition.totals)
    return call("charge", names, args)


def emit(events: Sequence[MarkedEvent]) -> Call:
    """Count events as pending and append them to their stream, in order.

    At least one event, and all of one partition. Replies 1 when the bell must ring.
    """
    partition = events[0].account.partition
    names = _ringing(partition)
    args: _Args = [RING_TTL_MS]
    for event in events:
        account, meter, sub_meter, event_id, _, at_most, payload, *_ = event
        names.append(account.pending(meter))
        args += (event_id, at_most, payload, event.stamps)
        if sub_meter is not None:
            names.append(account.pending(sub_meter))
            args += (event_id, at_most, "", "")  # only counted: it is appended once
    names.append(partition.totals)
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
    args: _Args = [key, event.event_id, event.amount, event.payload, event.stamps, RING_TTL_MS, outcome_ttl_ms]
    args.append(event.at_most)
    for sub_meter in sub_meters:
        names.append(account.pending(sub_meter))
        if sub_meter == event.sub_meter:
            args.append(len(names))
    names.append(account.partition.totals)
    return call("capture", names, args)


def settle(event: MarkedEvent, key: str, sub_meters: Iterable[str], *, outcome_ttl_ms: int) -> Call:
    """Turn the hold `key` into the event; what is left of it is free again.

    Always records, also without a hold: the work was done. `sub_meters`: as in `capture`.
    Replies [state before, event id, amount, repeated, must ring, meter of the hold or ''].
    """
    account, meter = event.account, event.meter
    names = [account.pending(meter), account.holds(meter), account.hold(key), *_ringing(account.partition)]
    args: _Args = [key, event.event_id, event.amount, event.payload, event.stamps, RING_TTL_MS, outcome_ttl_ms]
    args.append(event.at_most)
    for sub_meter in sub_meters:
        names.append(account.pending(sub_meter))
        if sub_meter == event.sub_meter:
            args.append(len(names))
        names.append(account.holds(sub_meter))
    names.append(account.partition.totals)
    return call("settle", names, args)


def release(
    account: AccountKeys,
    meter: str,
    key: str,
    sub_meters: Iterable[str],
    *,
    outcome_ttl_ms: int,
    late: bool = False,
    call_id: str | None = None,
) -> Call:
    """Give the hold `key` back and close the key: no late reserve can revive it.

    A `late` release leaves alone a hold that was reserved again since, and a key that nothing is known of. One for
    `call_id` leaves alone a hold that another call made, or was told of.
    `sub_meters`: as in `capture`. Replies [state before, meter or '', amount first held, amount given back].
    """
    names = [account.pending(meter), account.holds(meter), account.hold(key), *_maps(account, sub_meters)]
    names.append(account.partition.totals)
    args: _Args = [key, outcome_ttl_ms, int(late)]
    return call("release", names, args if call_id is None else [*args, call_id])


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


def lease(key: str, token: str, ttl_ms: int, *, unless_cached: str | None = None) -> Call:
    """Take the right to install what is read from Postgres from now on.

    `token` is a fresh one. Loaders at the same time share one lease; a publish ends it for all.
    Replies with the token in force, which `install` wants; with an empty one if there is a fresh text under the key
    `unless_cached`.
    """
    return call("lease", [key] if unless_cached is None else [key, unless_cached], [token, ttl_ms])


def install(
    stream: Stream,
    key: str,
    lease_key: str,
    token: bytes,
    text: str,
    *,
    ttl_ms: int,
    shortest_life_ms: int,
    kept_ms: int = 0,
    gone: Iterable[Gone] = (),
    version_key: str | None = None,
) -> Call:
    """Cache a text from Postgres, unless a newer one was published meanwhile.

    `token` is the one that `lease` replied with: once that lease is gone, nothing is installed. Ids that the text
    contains leave pending in the same step. It lives for `ttl_ms` from the moment at which the lease was taken, but at
    least for `shortest_life_ms` from now. With a longer `kept_ms` it then stays, stale, for `reuse`. A fresh newer text
    stays, a stale one does not. Replies 1 when it was installed, else 0; 'late' when its time was over before it came;
    'old' when a newer version was published, as remembered under `version_key`: the ledger that was asked is behind.
    """
    names: list[str] = [key, lease_key]
    args: _Args = [token, text, ttl_ms, shortest_life_ms, kept_ms]
    _leave(names, args, gone)
    if version_key is not None:
        names.append(version_key)
    names.append(stream.totals)
    return call("install", names, args)


def shed(account: AccountKeys, token: bytes, fresh: str, gone: Gone, *, ttl_ms: int) -> Call:
    """Take ids out of pending that the balance contains which `install` is about to cache under the lease `token`.

    Until then no balance is cached. Only for ids beyond what one `install` may take; repeating is harmless. The lease
    lasts for `ttl_ms` more, and the life of the balance begins with it as before.
    Replies with the token that `install` wants from now on, made of `fresh`; nil if that lease is gone.
    """
    name, ids = gone
    names = [account.balance, account.lease, name, account.partition.totals]
    return call("shed", names, [token, fresh, ttl_ms, len(ids), *ids])


def reuse(key: str, ms: int) -> Call:
    """Let a stale balance answer for `ms` from now, as Postgres does not. It ends when it would have ended.

    Leaves a fresh one alone. Replies 1 when there is a balance, else 0.
    """
    return call("reuse", [key], [ms])


def publish(
    stream: Stream,
    slot: int,
    entries: Sequence[str],
    publications: Sequence[Publication],
    *,
    version_ttl_ms: int | None = None,
    note: Note | None = None,
) -> Call:
    """Show a commit: texts appear, ids leave pending, entries leave the stream.

    A text replaces an older one, never a newer one. Where none is cached, only ids are removed; a loader's lease is
    gone. `slot` is the one of `keys.slot_of` in which the entries count as applied. The versions of the texts are
    remembered for `version_ttl_ms`: then each publication with a text has a `version_key`. A `note`, which needs
    `version_ttl_ms`, says in the hand of a drain that this was done.
    Replies with the number of entries deleted.
    """
    names = [stream.entries, stream.applied(slot)]
    args: _Args = [len(entries), *entries, len(publications)]
    for key, lease_key, gone, text, ends_ms, _ in publications:
        names += (key, lease_key)
        args += (text, ends_ms, len(gone))
        _leave(names, args, gone)
    if version_ttl_ms is not None:
        names += [each.version_key for each in publications if each.text and each.version_key]
        args.append(version_ttl_ms)
    if note is not None:
        names.append(stream.hand)
        args += note
    names.append(stream.totals)
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


def trim(stream: Stream, slot: int, first_id: str, last_id: str, notes: Sequence[Note]) -> Call:
    """Delete the stream entries from `first_id` to `last_id`: a batch, which the calls with these `notes` published.

    `slot` is as for `publish`. Replies with their number; -1 if nothing was deleted, as this Redis may not have known
    all of them when they were read, or not have all that was published. `last_id` is not the last possible id.
    """
    names = [stream.entries, stream.applied(slot), stream.hand, stream.totals]
    return call(
        "trim", names, [notes[0].token, first_id, last_id, follower_of(last_id), *(note.name for note in notes)]
    )


def hand(stream: Stream, token: str, grace_ms: int, taken: InHand | None = None, read_to: str | None = None) -> Call:
    """Note the range that a drain takes in hand, or the last entry that it has read; and that its owner lives.

    It counts as alive for `grace_ms`. Without `taken` and `read_to` the note stands as it is. Replies with the time
    (ms): what is read from Postgres from now on is not older. 0 when the note to keep is another's: another drain has
    taken over.
    """
    noted = taken or ((read_to,) if read_to else ())
    return call("hand", [stream.hand, stream.busy], [token, grace_ms, *noted])


def done(stream: Stream, token: str) -> Call:
    """Take the marker of a drain back that did not die.

    Replies with the number of entries in the stream, -1 when the marker is another's.
    """
    return call("done", [stream.hand, stream.busy, stream.entries], [token])


def anew(stream: Stream) -> Call:
    """Let a stream begin anew that has no entries and whose last id is ahead of the clock of Redis.

    Replies with that id, nil when there was nothing to do.
    """
    return call("anew", [stream.entries, stream.totals, stream.hand], [CLOCK_SKEW_MS])


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


def look(stream: Stream, minute: int) -> Call:
    """Note stream entries of a stream that left it, and no script disposed of.

    `minute`, since the epoch, is now: in none of the last ten may a worker of an older release have been at work.
    Replies with the number of those that it found lost.
    """
    older = [stream.applied_untold(each) for each in range(minute - _APPLIED_MINUTES, minute + 2)]
    return call("look", [stream.entries, stream.totals, *older], [])


def recount(stream: Stream, events: int, holds: int, stuck: int) -> Call:
    """Add `events` and `holds` to the totals, which a scan found too few, and note that `stuck` ids are."""
    return call("recount", [stream.totals], [events, holds, stuck])


def free(stream: Stream, last_id: str, gone: Iterable[Gone]) -> Call:
    """Take ids out of pending whose stream entries are lost: none was in the stream up to its `last_id`.

    Replies 1, or 0 where the stream has grown since: nothing happened.
    """
    names: list[str] = [stream.entries]
    args: _Args = [last_id]
    _leave(names, args, gone)
    return call("free", [*names, stream.totals], args)


def settled(stream: Stream) -> Call:
    """Forget the lost stream entries of a stream, which an operator has dealt with. Replies with their number."""
    return call("settled", [stream.totals], [])


def forget(stream: Stream, last_id: str) -> Call:
    """Delete a stream whose entries were moved elsewhere, up to `last_id`.

    Replies 1 when it is gone, 0 when there are entries after that one.
    """
    return call("forget", [stream.entries], [last_id])


def expire(stream: Stream, member: str) -> Call:
    """Take expired holds out of the maps that a member of `expiries` stands for.

    Notes when to look again.
    """
    return call("expire", [*stream.maps_of_expiring(member), stream.expiries, stream.totals], [member])


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
    call_id: str,
) -> Call:
    """Ask what the pool covers of the `wanted` units of a request, and hold that.

    The mode says how much it holds, for `ttl_ms`. `estimate` and `paid` are what the hold remembers. `tier` is the
    trust tier that the host says, '' for the account's own. `daily_budgets` are the units of each, the lowest first.
    The same `call_id` is the same call, sent twice; with another one the request is decided again, which is a repeat.
    Replies ['held' or 'advice', tier, daily budget, taken of the window before, left of the pool before, held, expires
    ms, repeated]; ['conflict', user, held]; ['closed', state]; ['load'] for the standing or ['load_pool'].
    """
    names = _pool_and(user_id)
    if mode != "advise":
        names += (SPONSORSHIP.hold(request_id), SPONSORSHIP.expiries)
    args: _Args = [mode, user_id, request_id, wanted, estimate, paid, ttl_ms, outcome_ttl_ms, DAY_MS, tier]
    args += (SPONSORSHIP.expiring(), SPONSORSHIP.expiring(user_id), call_id, *_pairs(daily_budgets))
    names.append(SPONSORSHIP.totals)
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
    trace: str = "",
) -> Call:
    """Say that a request cost `actual` units; the pool pays its part of what was held.

    The user paid `paid` of them (None: as many as the hold says). The rest of the hold is free again. `tier`: as in
    `sponsor_decide`, or '?' where the host was not asked yet. `trace` is the `traceparent`, '' without one.
    Replies ['settled', held, actual, paid, absorbed, late, repeated, must ring]; ['conflict', user, held]; ['closed',
    state]; and for a late one ['tier'], ['load'] or ['load_pool'], where it needs these.
    """
    names = [*_pool_and(user_id), SPONSORSHIP.hold(request_id), *_ringing(SPONSORSHIP), SPONSORSHIP.totals]
    args: _Args = [user_id, request_id, actual, "" if paid is None else paid, RING_TTL_MS, outcome_ttl_ms, DAY_MS, tier]
    return call("sponsor_settle", names, [*args, trace, *_pairs(daily_budgets)])


def sponsor_release(
    user_id: str, request_id: str, reason: str, *, outcome_ttl_ms: int, call_id: str | None = None
) -> Call:
    """Give a request's hold back to the pool and the user's window, and close its id.

    What has expired or was settled stays so. For `call_id`, what another call holds, or was told of, stays as well.
    Replies [state before, held at first], or ['conflict', user, held].
    """
    names = [SPONSORSHIP.hold(request_id), SPONSORSHIP.promised, SPONSORSHIP.holds]
    names += (SPONSORSHIP.today(user_id), SPONSORSHIP.user_holds(user_id), SPONSORSHIP.totals)
    args: _Args = [user_id, request_id, reason, outcome_ttl_ms]
    return call("sponsor_release", names, args if call_id is None else [*args, call_id])


def sponsor_credit(request_id: str, paid: int, trace: str = "") -> Call:
    """Let a share of the `paid` units that a request brought in flow into the pool.

    `trace` is the `traceparent`, '' without one.
    A repeat is known when it is applied. Replies 1 when the bell must ring.
    """
    return call("sponsor_credit", _ringing(SPONSORSHIP), [request_id, paid, RING_TTL_MS, trace])


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
