"""Proof: replay every change of every account through the rules, and compare with Postgres and Redis.

The proof takes accounts in chunks, one read-only snapshot each, so it never blocks a batch. It names every difference.
None is a rounding error, because the books round nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import Engine

from schemas.status import Difference
from worker.admin.losses import find_stuck
from worker.keyspace import keys
from worker.keyspace.cache import cache_text
from worker.keyspace.totals import read_totals
from worker.ledger import sponsorship
from worker.ledger.accounts import Snapshot, next_users, read_accounts
from worker.ledger.connection import Postgres, batch_connection, begin_snapshot, open_engine, read_clock
from worker.ledger.losses import recorded_among
from worker.ledger.orders import wrong_keys
from worker.ledger.proof import applied_before, read_history, wrong_reversals, wrong_windows
from worker.reports.proof_credits import CREDIT_RULES, taken_back, wrong_words
from worker.reports.proof_limits import limits_after, wrong_limits
from worker.reports.proof_sponsorship import totals_of, verify_pool, verify_promises
from worker.reports.proof_sums import wrong_sums, wrong_sums_of_days
from worker.reports.wrong import Wrong
from worker.resources import Resources
from worker.rules.account import SCHEDULE, Account, Balance, Parked, Waiting, changes_after, without_schedule
from worker.rules.batch import count_backend, count_meter
from worker.rules.calendar import CALENDAR_CADENCES, boundary
from worker.rules.corrections import GRANT_KINDS, forgiven, shift_back, shifted, taken_back_shift, undoing
from worker.rules.credits import STARTED, Purchases, add_units, after_entry
from worker.rules.fractions import MILLIONTHS, carried_before, whole_units
from worker.rules.history import TERM_KINDS, balance_of
from worker.rules.lifecycle import as_of
from worker.rules.periods import (
    Paid,
    Terms,
    calendar_meeting_of,
    calendar_met,
    corrected,
    lapsed,
    meeting_of,
    met,
    next_period,
    renewed,
    resumed,
    rolled_over,
    under_plan,
    until_provided,
)
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.sponsorship import hash_of
from worker.rules.wallets import cost_in_millionths
from worker.rules.waterfall import limit_in_force, pay


class LedgerWrongError(RuntimeError):
    """A proof found differences."""


class VerifyReport(NamedTuple):
    """The scope of a proof, and every difference it found.

    It began with the first change of `from_zero` accounts, and with the checkpoint of the others.
    """

    from_zero: int
    from_checkpoint: int
    changes: int
    pending_maps: int
    found: list[Difference]

    @property
    def accounts(self) -> int:
        """Return the number of accounts that were proven."""
        return self.from_zero + self.from_checkpoint

    @property
    def differences(self) -> list[str]:
        """Return the differences in words."""
        return [difference.text for difference in self.found]


@dataclass
class Replayed:
    """An account as its changes alone make it."""

    account: Account
    consumed: dict[str, int] = field(default_factory=dict)
    granted: dict[str, int] = field(default_factory=dict)
    purchases: dict[str, Purchases] = field(default_factory=dict)
    # Entries that may be undone, by key and meter.
    made: dict[tuple[str, str], EntryRow] = field(default_factory=dict)

    @classmethod
    def nothing(cls, user_id: str) -> Replayed:
        """Return the account before its first change."""
        nothing = Account(user_id=user_id, plan="", status="", trust="new", version=0, balances={})
        return cls(nothing)

    def put(self, balance: Balance) -> None:
        """Take over the new balance of one meter."""
        self.account = self.account._replace(balances={**self.account.balances, balance.meter: balance})


def verify_ledger(
    resources: Resources, progress: Callable[[int], None] | None = None, *, named: Callable[[str], str] = str
) -> VerifyReport:
    """Prove all balances from the first change on, the sums of reports, and the pool. Reads only, minds no checkpoint.

    `progress` receives the number of accounts proved so far. `named` makes the name of a user for the differences.
    Raises the errors of Postgres and Redis: an unfinished proof is no proof.
    """
    settings = resources.settings
    engine = open_engine(settings, statement_timeout_ms=settings.verify_timeout_ms)
    differences: list[Difference] = []
    accounts = changes = 0
    after = ""  # before every id
    try:
        while True:
            with batch_connection(engine) as postgres:
                begin_snapshot(postgres)
                users = next_users(postgres, after, settings.verify_chunk_accounts)
                if not users:
                    break
                changes += _verify_chunk(resources, postgres, users, named, differences)
            accounts += len(users)
            after = users[-1]
            if progress is not None:
                progress(accounts)
        rest = verify_rest(resources, engine, named, whole=True)
    finally:
        engine.dispose()
    return VerifyReport(accounts, 0, changes + rest.changes, rest.pending_maps, differences + rest.found)


class Rest(NamedTuple):
    """What a proof found beside the accounts, and how much it looked at."""

    changes: int
    pending_maps: int
    found: list[Difference]


def verify_rest(resources: Resources, engine: Engine, named: Callable[[str], str], *, whole: bool) -> Rest:
    """Prove the pool, and all that is pending in Redis; with `whole` also the sums of days.

    Raises the errors of Postgres and Redis.
    """
    of_pool: list[str] = []
    differences: list[Difference] = []
    if whole:
        for user_id, text, meter, expected, found in wrong_sums_of_days(engine):
            whose = named(user_id) if user_id else None
            differences.append(Wrong(text, "sums", meter, expected, found).of(whose, whose or "all accounts"))
    changes = verify_pool(resources, engine, named, of_pool)
    pending_maps = _verify_pending(resources, engine, named, differences)
    _verify_streams(resources, engine, named, differences)
    pending_maps += verify_promises(resources, engine, named, of_pool)
    return Rest(changes, pending_maps, differences + [_of_pool(text) for text in of_pool])


def _verify_chunk(
    resources: Resources,
    postgres: Postgres,
    users: Sequence[str],
    named: Callable[[str], str],
    differences: list[Difference],
) -> int:
    """Replay these accounts and compare; return the number of changes replayed."""
    loaded = read_accounts(postgres, users)
    replayed = {user_id: Replayed.nothing(user_id) for user_id in users}
    changes = 0
    for row in read_history(postgres, users):
        changes += 1
        wrongs = replay(replayed[row.user_id], row)
        name = named(row.user_id)
        differences.extend(wrong.of(name, f"{name} seq {row.seq}") for wrong in wrongs)
    for user_id, stored in loaded.accounts.items():
        compared = compare(stored, loaded.counters[user_id], replayed[user_id])
        differences.extend(wrong.of(named(user_id), named(user_id)) for wrong in compared)
    for user_id, wrong in compare_entries(postgres, dict.fromkeys(users, 0), named):
        differences.append(wrong.of(named(user_id), named(user_id)))
    for user_id, wrong in compare_sums(postgres, users):
        differences.append(wrong.of(named(user_id), named(user_id)))
    for user_id, wrong in compare_cached(resources, postgres, loaded):
        differences.append(wrong.of(named(user_id), named(user_id)))
    return changes


def compare_entries(
    postgres: Postgres, after: Mapping[str, int], named: Callable[[str], str]
) -> Iterator[tuple[str, Wrong]]:
    """Compare reversals with their events, and orders with their keys; yield users that differ.

    It looks at the changes of each user after the number in `after`.
    """
    spans = list(after), list(after.values())
    for user_id, key in wrong_reversals(postgres, *spans):
        yield user_id, Wrong(f"ledger entry {key} does not put back the parts of its event", "reversal")
    for user_id, key, meter, should in wrong_windows(postgres, *spans):
        text = f"ledger entry {key} counts other units in its window than the log, which has {should}"
        yield user_id, Wrong(text, "entry limits", meter, should)
    for user_id, key, owner in wrong_keys(postgres, *spans):
        whose = f"is the key of {named(owner)}" if owner else "has no row in order_key"
        yield (
            user_id,
            Wrong(
                f"ledger entry {key} {whose}",
                "order key",
                expected=named(user_id),
                found=named(owner) if owner else None,
            ),
        )


def replay(replayed: Replayed, row: EntryRow | UsageRow) -> Iterator[Wrong]:
    """Replay one change; yield each way in which it breaks the rules."""
    if row.seq != replayed.account.version + 1:
        yield Wrong(
            f"expected seq {replayed.account.version + 1}", "sequence", None, replayed.account.version + 1, row.seq
        )
    if isinstance(row, UsageRow):
        yield from _replay_usage(replayed, row)
        return
    replayed.account = replayed.account._replace(version=row.seq)
    if row.meter == "":
        _replay_account(replayed, row)
    else:
        yield from _replay_entry(replayed, row)


def _replay_usage(replayed: Replayed, row: UsageRow) -> Iterator[Wrong]:
    account, version = replayed.account, row.seq or 0
    before, own = account.balances.get(row.payer), account.balances.get(row.meter)
    if before is None or own is None:
        replayed.account = account._replace(version=version)
        meter = row.payer if before is None else row.meter
        yield Wrong(f"event {row.event_id} on meter {meter}, which was never opened", "never opened", meter)
        return
    left, split = pay(before.buckets(account.status), row.amount)
    carried = own.carried if row.remainder is None or row.remainder < 0 else row.remainder
    if row.wallet is None:
        cap_used = count_backend(row.dimensions, row.amount, before)
    else:
        cap_used = count_meter(row.meter, row.amount, before)
    grants, taken = before.grants, None
    if grants is not None and split.from_purchased:
        rest, taken = grants.take(split.from_purchased)
        grants = rest.packed()
    limits = before.limits
    if limits is not None:
        limits = limits.spent(row.amount)
    # One new value each, as this is most of the work of a proof.
    after = before._replace(
        used=left.used, rollover=left.rollover, purchased=left.purchased, cap_used=cap_used,
        carried=carried if row.wallet is None else before.carried, grants=grants, limits=limits,
    )  # fmt: skip
    balances = {**account.balances, row.payer: after}
    if row.wallet is not None:
        balances[row.meter] = own._replace(carried=carried)
    replayed.account = account._replace(version=version, balances=balances)
    replayed.consumed[row.payer] += row.amount
    stored = (row.from_subscription, row.from_rollover, row.from_purchased, row.overflow_to_debt)
    if stored != tuple(split):
        text = f"event {row.event_id} has parts {stored}, the waterfall says {tuple(split)}"
        yield Wrong(text, "event parts", row.meter, tuple(split), stored)
    if row.grants is not None and row.grants != taken:  # a worker of an earlier release names no grants
        text = f"event {row.event_id} took {row.grants} of its grants, the rules say {taken}"
        yield Wrong(text, "event grants", row.meter, taken, row.grants)
    if not _is_priced_right(row, own.carried):
        price = "" if row.price is None else f" × {row.price}"
        text = f"event {row.event_id} has amount {row.amount}, not quantity × multiplier{price} with what was carried"
        yield Wrong(text, "event amount", row.meter, None, row.amount)
    if row.period_start != before.counted_from:
        text = f"event {row.event_id} names the period from {row.period_start}, open was {before.counted_from}"
        yield Wrong(text, "event period", row.meter, before.counted_from, row.period_start)


def _is_priced_right(row: UsageRow, carried: int) -> bool:
    """True if the amount of a row follows from quantity and multiplier, and from the millionths carried to it.

    If it drew on a wallet, from the price also.
    """
    if row.wallet is not None:
        exact = cost_in_millionths(row.quantity, row.multiplier, row.price or "0")
        if row.remainder is None:
            return row.amount == exact // MILLIONTHS
        return row.amount * MILLIONTHS + row.remainder == exact + carried
    if row.remainder is None:
        return row.amount == whole_units(row.quantity, row.multiplier, "down")[0]
    if row.remainder < 0:
        return (row.amount, row.remainder) == whole_units(row.quantity, row.multiplier, "up")
    return carried_before(row.quantity, row.multiplier, row.amount, row.remainder) == carried


def _replay_account(replayed: Replayed, row: EntryRow) -> None:
    """Replay a change of the account as a whole."""
    detail, account = row.detail, replayed.account
    if row.kind == "open":
        replayed.granted |= detail.get("seeded", {})
    if row.kind == "change_plan":
        account = account._replace(next_plan=None, plan_change_at=None)
    if row.kind == "close":
        account = without_schedule(account)
    known = {name: detail[name] for name in ("plan", "status", "trust", "reopened", *SCHEDULE) if name in detail}
    for name in ("plan_change_at", "status_change_at", "paid_from", "paid_until"):
        if known.get(name):
            known[name] = datetime.fromisoformat(known[name])
    if "waiting" in known:
        known["waiting"] = tuple(Waiting.from_json(change) for change in known["waiting"])
    replayed.account = account._replace(**known)


def _replay_entry(replayed: Replayed, row: EntryRow) -> Iterator[Wrong]:
    """Replay a change of one meter."""
    detail = row.detail
    before = replayed.account.balances.get(row.meter)
    had = (before.used, before.rollover, before.purchased) if before else (0, 0, 0)
    changed = (row.used_change, row.rollover_change, row.purchased_change)
    stored = (row.used_after, row.rollover_after, row.purchased_after)
    made = tuple(old + change for old, change in zip(had, changed, strict=True))
    if stored != made:
        text = f"ledger entry {row.kind} {row.entry_key} says {stored} after it, replayed {made}"
        yield Wrong(text, "entry balance", row.meter, made, stored)
    if row.kind == "open_meter":
        replayed.consumed[row.meter] = detail.get("lifetime_consumed", 0)
        replayed.granted[row.meter] = detail.get("lifetime_granted", 0) + replayed.granted.get(row.meter, 0)
    elif before is None:
        text = f"ledger entry {row.kind} {row.entry_key} on meter {row.meter}, which was never opened"
        yield Wrong(text, "never opened", row.meter)
        return
    after = _left_by(before, row)
    if before is not None:
        expected, wrong = _expected_after(replayed, before, after, row)
        yield from wrong
        if row.kind not in TERM_KINDS:  # no entry says what is left of the grants: the rules do
            made_of = add_units(before, row.purchased_change) if expected is None else expected
            after = after._replace(grants=made_of.grants)
            yield from wrong_limits(before.limits, after.limits, row)
            expected = expected and expected._replace(limits=after.limits)
        if expected is not None and row.kind in ("renewal", "lapse") and after.cadence in CALENDAR_CADENCES:
            expected = expected._replace(backing=after.backing)  # its plan says whether invoices pay a calendar
        if expected is not None and expected != after:
            text = f"ledger entry {row.kind} {row.entry_key} leaves {after}, the rules say {expected}"
            yield Wrong(text, "entry rule", row.meter, expected, after)
    replayed.put(after)
    purchases = replayed.purchases.get(row.meter, Purchases())
    yield from _wrong_purchases(purchases, row)
    replayed.purchases[row.meter] = after_entry(purchases, row)
    if row.kind in ("grant", "grant_ahead", "clawback", "adjust") and not row.entry_key.startswith(STARTED):
        replayed.made[row.entry_key, row.meter] = row
    if row.kind == "grant":
        replayed.granted[row.meter] += row.purchased_change
    if row.kind == "reversal":
        replayed.consumed[row.meter] -= sum(detail["parts"].values())


def _left_by(before: Balance | None, row: EntryRow) -> Balance:
    """Return the balance that an entry says it leaves, with the grants of before it."""
    detail = row.detail
    if row.kind in TERM_KINDS or before is None:
        after = _with_first_end(balance_of(row))
        if before is not None and row.kind != "close":
            after = after._replace(carried=before.carried, grants=before.grants)
    else:
        after = before._replace(used=row.used_after, rollover=row.rollover_after, purchased=row.purchased_after)
        if "cap_used" in detail:
            parked = Parked.from_json(detail["parked"]) if detail["parked"] else None
            after = after._replace(cap_used=detail["cap_used"], parked=parked)
    return after._replace(limits=limits_after(before, row))


def _expected_after(
    replayed: Replayed, before: Balance, after: Balance, row: EntryRow
) -> tuple[Balance | None, list[Wrong]]:
    """Return the balance that the rules make of `before`, None without a rule, and what is wrong with the entry."""
    if row.kind == "undo":
        return _expected_undo(replayed, before, row)
    if row.kind in CREDIT_RULES:
        return CREDIT_RULES[row.kind](replayed.purchases.get(row.meter, Purchases()), before, after, row)
    return _expected(replayed.account, before, after, row.kind, row.detail), []


def _expected_undo(replayed: Replayed, before: Balance, row: EntryRow) -> tuple[Balance, list[Wrong]]:
    """Return the balance after the counter-entry of an earlier entry, and what is wrong with the counter-entry."""
    undone = replayed.made.pop((row.detail["entry"], row.meter), None)
    if undone is None:
        text = f"ledger entry undo {row.entry_key} undoes nothing, or for the second time"
        return before, [Wrong(text, "undo", row.meter)]
    purchases = replayed.purchases.get(row.meter, Purchases())
    facts = undoing(undone, purchases)
    told = {name: row.detail[name] for name in facts}
    text = f"ledger entry undo {row.entry_key} says {told}, the rules say {facts}"
    wrong = [] if told == facts else [Wrong(text, "undo", row.meter, facts, told)]
    if undone.kind in GRANT_KINDS:
        expected, more = taken_back(purchases, before, row, facts["amount"], facts["order"])
        return expected, wrong + more
    if "grants" not in row.detail:
        return shifted(before, taken_back_shift(undone), row.created_at), wrong
    back = shift_back(undone, before, purchases, row.created_at)
    return back.balance, wrong + wrong_words(row, back.used, back.gone, back.reclaimed)


def _wrong_purchases(purchases: Purchases, row: EntryRow) -> Iterator[Wrong]:
    """Yield each way in which an entry says something else about the purchases before it than they are.

    Entries of former releases say nothing: their refunds had no bound, and orders did not go along with a carry-over.
    """
    detail = row.detail
    if row.kind == "clawback" and "allowed" in detail:
        order = detail["order"]
        allowed = 0 if order is not None and order not in purchases.orders else purchases.may_take(order)
        if detail["allowed"] != allowed or detail["amount"] > allowed:
            said = f"takes {detail['amount']} of {detail['allowed']}"
            text = f"ledger entry clawback {row.entry_key} {said}, the rules allow {allowed}"
            yield Wrong(text, "purchases", row.meter, allowed, detail["amount"])
        if detail["total_refunded"] is not None and order in purchases.orders:
            taken = purchases.orders[order].taken + detail["amount"]
            if taken != detail["total_refunded"]:
                total = detail["total_refunded"]
                text = f"ledger entry clawback {row.entry_key} makes a total of {taken}, not {total}"
                yield Wrong(text, "purchases", row.meter, total, taken)
    if row.kind == "transfer_out" and "orders" in detail and dict(detail) != {**detail, **purchases.moved()}:
        text = f"ledger entry transfer_out {row.entry_key} takes along other orders than {purchases.moved()}"
        yield Wrong(text, "purchases", row.meter, purchases.moved())


def _expected(
    account: Account, before: Balance, after: Balance, kind: str, detail: Mapping[str, Any]
) -> Balance | None:
    """Return the balance that the rules make of `before`; None without a rule.

    The ledger entry names the terms.
    """
    if kind in TERM_KINDS and kind != "close":
        return _expected_period(account, before, after, kind, detail)
    if kind == "forgive_debt":
        return forgiven(before, min(detail["amount"], max(0, -before.rollover)))
    if kind == "close":
        return after._replace(
            used=0, rollover=0, purchased=0, cap_used=None, parked=None, carried=0, grants=None, limits=None
        )
    return None


def _expected_period(
    account: Account, before: Balance, after: Balance, kind: str, detail: Mapping[str, Any]
) -> Balance | None:
    """Return the period that the rules make of `before`; None without a rule."""
    terms = Terms.of(after)
    if kind == "refill":
        return _refilled(account, before, after, terms, detail)
    if kind == "renewal":
        return _renewed(account, before, after, terms, detail)
    if kind == "lapse":
        grace = after.period_end - after.period_start if after.period_end else timedelta(0)
        return lapsed(before, terms, account.status, grace)
    if kind == "resume":
        return resumed(before, datetime.fromisoformat(detail["at"]), timedelta(seconds=detail["grace_s"]))
    if kind == "missing":
        return before._replace(backing="missing")
    if kind == "trial":
        return before._replace(backing="trial")
    if kind == "set_period":
        return corrected(before, datetime.fromisoformat(detail["end"]))
    if kind == "change_plan":
        at = datetime.fromisoformat(detail["at"])
        expected, _ = under_plan(before, terms, account.status, at)
        if before.allowance is None and after.used == before.used and expected.used != after.used:
            # Of a release that let all of an endless unlimited allowance count in the next period.
            kept = ("used", "cap_used", "period_start", "counted_from")
            expected = expected._replace(**{name: getattr(after, name) for name in kept})
        if expected.cadence in CALENDAR_CADENCES:
            return expected._replace(backing=after.backing)
        # The provider alone sets the end of its period.
        return expected if after == expected else until_provided(expected, after.period_end)
    return None


def _refilled(account: Account, before: Balance, after: Balance, terms: Terms, detail: Mapping[str, Any]) -> Balance:
    """Return the balance that a boundary of the calendar makes of `before`."""
    paid = None
    if "grace_s" in detail:  # a calendar that invoices pay
        paid = Paid(account.paid_from, account.paid_until, timedelta(seconds=detail["grace_s"]))
    crossed = next_period(before, terms, account.status, datetime.fromisoformat(detail["until"]), paid)
    if crossed is None:
        return before
    expected, skipped = crossed
    if paid is not None and skipped and "accrues" not in detail:
        # Of a release in which a skipped period accrued also if it began shortly before the paid time was over.
        limit = limit_in_force(terms.allowance, account.status)
        more = rolled_over(limit or 0, 0, expected.rollover, terms.rollover_cap)
        if after.rollover == more:
            return expected._replace(rollover=more)
    return expected


def _renewed(
    account: Account, before: Balance, after: Balance, terms: Terms, detail: Mapping[str, Any]
) -> Balance | None:
    """Return the balance that an invoice makes of `before`."""
    start, end = after.period_start, after.period_end
    if "meeting" not in detail:  # of a release in which every renewal closed the open period, paid or not
        return renewed(before, terms, account.status, start, end)
    if "bounds" in detail:  # a calendar that invoices pay
        since, until = (
            moment and datetime.fromisoformat(moment) for moment in (detail["paid_from"], detail["paid_until"])
        )
        paid = Paid(since, until, timedelta(seconds=detail["grace_s"]))
        start, end = (datetime.fromisoformat(moment) for moment in detail["bounds"])
        meeting = calendar_meeting_of(before, paid, start, end)
        if meeting == "follows" and detail["meeting"] == "continues" and "grid" not in detail:
            meeting = "continues"  # of a release whose calendars reached back before their anchor
        return calendar_met(before, terms, account.status, start, end, meeting, paid.grace)
    if end is None:
        return None
    meeting = meeting_of(before, start, end, timedelta(seconds=detail["grace_s"]))
    return before if meeting == "stale" else met(before, terms, account.status, start, end, meeting)


def _with_first_end(balance: Balance) -> Balance:
    """Fill in the end of a calendar period that the first releases left open.

    Their migration wrote it into the balance.
    """
    if balance.period_end is None and balance.cadence in CALENDAR_CADENCES:
        return balance._replace(period_end=boundary(balance.anchored_at, balance.cadence, 1))
    return balance


def compare(stored: Account, counters: dict[str, tuple[int, int]], replayed: Replayed) -> list[Wrong]:
    made = replayed.account
    found = [
        Wrong(f"account {name} is {has}, its changes make it {should}", f"account {name}", None, should, has)
        for name in ("plan", "status", "trust", "version", "reopened", *SCHEDULE)
        for has, should in [(getattr(stored, name), getattr(made, name))]
        if has != should
    ]
    for meter in sorted(set(stored.balances) | set(made.balances)):
        has, should = stored.balances.get(meter), made.balances.get(meter)
        if has is None or should is None:
            found.append(Wrong(f"{meter} has {has}, its changes make it {should}", "balance", meter, should, has))
            continue
        found += [
            Wrong(
                f"{meter} has {name} {is_now}, its changes make it {made_of}", f"balance {name}", meter, made_of, is_now
            )
            for name, is_now, made_of in zip(Balance._fields, has, should, strict=True)
            if is_now != made_of
        ]
        lifetime = (replayed.consumed.get(meter, 0), replayed.granted.get(meter, 0))
        found += [
            Wrong(f"{meter} {name} {has_units} in its life, its changes make it {units}", name, meter, units, has_units)
            for name, has_units, units in zip(("consumed", "granted"), counters[meter], lifetime, strict=True)
            if has_units != units
        ]
    return found


def compare_sums(postgres: Postgres, users: Sequence[str]) -> Iterator[tuple[str, Wrong]]:
    """Compare the sums of the reports over all accounts with the log of these; yield users that differ."""
    for user_id, text, meter, expected, found in wrong_sums(postgres, users):
        yield user_id, Wrong(text, "sums", meter, expected, found)


def compare_cached(resources: Resources, postgres: Postgres, loaded: Snapshot) -> list[tuple[str, Wrong]]:
    """Compare cached balances at the same version; return users that differ.

    Redis may lag, but at the same version it must show the same balance.
    """
    users = list(loaded.accounts)
    partitions = resources.settings.partitions
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.get(keys.account_of(user_id, partitions).balance)
        cached = pipe.execute()
    # A worker or check computed a cached balance during the replay, or at most its life before the snapshot. The
    # balance changes by itself at boundaries: any of these moments may be the one it shows,
    # by the catalogue that was in force then.
    first, last = loaded.now - timedelta(milliseconds=resources.settings.cache_ttl_ms), read_clock(postgres)
    catalogues = resources.in_force.timeline.between(first, last)
    found = []
    for user_id, raw in zip(users, cached, strict=True):
        if raw is None:
            continue
        head, *lines = raw.decode().split("\n")
        account = loaded.accounts[user_id]
        if head.split(" ")[:2] != [str(loaded.epoch), str(account.version)]:
            continue
        views = []
        for catalogue in catalogues:
            at: datetime | None = first
            while at is not None and at <= last:
                current = as_of(catalogue, account, at)
                views.append(set(cache_text(loaded.epoch, current).split("\n")[1:]))
                at = min(changes_after(current, at, catalogue.renewal_grace), default=None)
        if set(lines) not in views:
            text = f"Redis says {lines}, the ledger {sorted(views[-1])}"
            found.append((user_id, Wrong(text, "cached balance", None, sorted(views[-1]), lines)))
    return found


def _verify_pending(
    resources: Resources, engine: Engine, named: Callable[[str], str], differences: list[Difference]
) -> int:
    """Prove that totals equal their maps, and that no old applied event is pending."""
    maps = 0
    for raw_key in resources.redis.scan_iter(match=keys.PENDING_PATTERN, count=1_000):
        user_id, meter = keys.owner_of_pending(raw_key.decode())
        fields = cast("dict[bytes, bytes]", resources.redis.hgetall(raw_key))
        if not fields:
            continue
        maps += 1
        total, ids_sum = totals_of(fields)
        if total != ids_sum:
            text = f"pending {meter} total {total}, its ids sum to {ids_sum}"
            wrong = Wrong(text, "pending total", meter, ids_sum, total)
            differences.append(wrong.of(named(user_id), named(user_id)))
        events = [name[2:].decode() for name in fields if name.startswith(b"e:")]
        stale = _stale(resources, engine, user_id, meter, events)
        differences.extend(wrong.of(named(user_id), named(user_id)) for wrong in stale)
    return maps


def _verify_streams(
    resources: Resources, engine: Engine, named: Callable[[str], str], differences: list[Difference]
) -> None:
    """Name stream entries that are lost, and the pending ids that count for ever because of it.

    Ids that the ledger has recorded are no loss: they have a minute to leave pending, and are named after it.
    """
    remedy = "`meterfall pending reconcile` frees what they hold"
    for search in find_stuck(resources).values():
        with batch_connection(engine) as postgres:
            recorded = recorded_among(postgres, [(each.user_id, each.event_id) for each in search.stuck])
            stuck = [
                each
                for each in search.stuck
                if (each.user_id, each.event_id) not in recorded
                and not (each.user_id == "" and sponsorship.is_recorded(postgres, hash_of(each.event_id)))
            ]
        for each in stuck:
            user = named(each.user_id) if each.user_id else None
            whose = f"{user}: event" if user else "pool: request"
            text = f"{whose} {each.event_id} has {each.units} units pending, and no stream entry; {remedy}"
            differences.append(
                Difference(user_id=user, meter=None, kind="lost", expected="0", found=str(each.units), text=text)
            )
    for stream, totals in read_totals(resources.redis, keys.streams(resources.settings.partitions)).items():
        if totals.all_lost:
            text = f"partition {stream.name}: {totals.all_lost} stream entries are lost; {remedy}"
            differences.append(
                Difference(user_id=None, meter=None, kind="lost", expected="0", found=str(totals.all_lost), text=text)
            )


def _stale(resources: Resources, engine: Engine, user_id: str, meter: str, events: Sequence[str]) -> list[Wrong]:
    if not events:
        return []
    seconds = resources.settings.pending_alarm_seconds
    if resources.redis.xlen(keys.partition_of(user_id, resources.settings.partitions).entries):
        return []  # it may be a repeat that waits to be recognised
    with batch_connection(engine) as postgres:
        late = applied_before(postgres, user_id, events, seconds)
    return [
        Wrong(f"event {event} on {meter} was applied over {seconds} s ago and is pending", "stale pending", meter)
        for event in late
    ]


def _of_pool(text: str) -> Difference:
    return Difference(user_id=None, meter=None, kind="pool", expected=None, found=None, text=text)
