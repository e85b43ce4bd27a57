"""A life under another catalogue: what would have paid for the same events. Pure rules, no I/O.

The ledger has what happened to an account: events, and entries. Some entries are facts from outside: an invoice, a
grant, a refund, a change of plan or status. A simulated account meets these facts again, in their order. The other
entries follow from the rules: a refill, a lapse, the start and the end of a grant. The simulated account makes its own.
Under the catalogue that was in force it makes the same ones, so it ends where the ledger does.

The log has no stream time of an event. The real account bounds it: no boundary of its own lay between the stream time
and the last moment before its next change, so one is as good as the other; see `moment_of`.

Limits and sub-caps deny checks, and never say who pays. So limits set by an operator or a user are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

from config.catalogue import Catalogue
from worker.rules.account import Account, Balance, Change, Waiting, without_schedule
from worker.rules.batch import charge
from worker.rules.corrections import GRANT_KINDS, Shift, forgiven, shift_back, shifted, undoing
from worker.rules.credits import (
    CREDIT_KINDS,
    STARTED,
    Purchases,
    add_units,
    after_entry,
    give,
    grant_in,
    grants_on,
    move_in,
    move_out,
    put_back,
    take_back,
)
from worker.rules.fractions import whole_units
from worker.rules.grants import UNNAMED, Grants
from worker.rules.history import balance_of, entry_of
from worker.rules.lifecycle import (
    Invoice,
    bring_up_to_date,
    change_plan,
    change_status,
    cross_grants_of,
    first_change,
    open_account,
    open_late,
    renew_account,
    set_period,
    waiting_with,
)
from worker.rules.periods import rolled_over, terms_of
from worker.rules.received import Event
from worker.rules.rows import EntryRow, UsageRow
from worker.rules.wallets import draws_of
from worker.rules.waterfall import Split

_INSTANT = timedelta(microseconds=1)
# Later than any clock: such an event is applied at the moment of the call.
_AT_THE_MOMENT = f"{10**17}-0"


class Question(NamedTuple):
    """Which catalogue to try from `since` on, in place of the one that was `in_force` at a moment.

    `plans` has the plan to try in place of another, by code.
    """

    catalogue: Catalogue
    in_force: Callable[[datetime], Catalogue]
    plans: Mapping[str, str]
    since: datetime

    def plan(self, code: str) -> str:
        """Return the plan to try in place of `code`."""
        return self.plans.get(code, code)


class Charged(NamedTuple):
    """An event as the simulated account paid it: the meter whose buckets paid, and the units of each bucket.

    `grants` are the units that it took of each grant, by key; `is_unlimited` if the allowance was.
    """

    payer: str
    split: Split
    grants: Mapping[str, int]
    period_start: datetime
    is_unlimited: bool

    @property
    def used(self) -> Mapping[str, int]:
        """The units that came from grants, by key; credit without an order has the key of none."""
        return self.grants or ({UNNAMED: self.split.from_purchased} if self.split.from_purchased else {})


def moment_of(in_force: Catalogue, real: Account, used: Collection[str] | None, stamp: datetime) -> datetime:
    """Return a moment on the same side of all boundaries of the `real` account as the unknown stream time of a row.

    `stamp` is the time at which the row was written, `real` the account then, and `used` the meters that it moved; None
    for a command, which brings all meters up to date. The real account had no change due at the stream time.
    """
    first = first_change(in_force, real, used)
    return stamp if first is None or first > stamp else first - _INSTANT


class Simulated:
    """One account under the catalogue of a question, from the first row of the window on. Feed it every row in order.

    `wanted` are events that will be reversed: their parts are kept until then.
    """

    def __init__(
        self,
        question: Question,
        account: Account,
        purchases: Mapping[str, Purchases] = MappingProxyType({}),
        made: Mapping[tuple[str, str], EntryRow] = MappingProxyType({}),
        wanted: Collection[str] = (),
    ) -> None:
        """Begin with the real account as it was, or with none, and put it under the catalogue of the question."""
        self.account = account
        self._question, self._catalogue = question, question.catalogue
        self._purchases, self._made = dict(purchases), dict(made)
        self._wanted, self._kept = frozenset(wanted), dict[str, Charged]()
        self._taken: set[str] = set()  # keys of invoices and corrections that waited, and took effect by themselves
        if account.version:
            self._begin()

    @classmethod
    def opened(
        cls, question: Question, real: Account, rows: Sequence[EntryRow], wanted: Collection[str] = ()
    ) -> Simulated:
        """Open an account as the `real` one was by these entries, under the catalogue of the question."""
        simulated = cls(question, real._replace(version=0), wanted=wanted)
        simulated._open(real, rows[0].created_at)
        simulated._note_entries(rows)
        return simulated

    def _open(self, real: Account, at: datetime) -> None:
        """Open the account; what it brought along stays."""
        plan = self._question.plan(real.plan)
        opened = real
        if self._differs(self._question.in_force(at), real, plan):
            start = min((balance.period_start for balance in real.balances.values()), default=at)
            ends = [each.period_end for each in real.balances.values() if each.cadence == "subscription"]
            trial_end = real.status_change_at if real.status == "trialing" else None
            end = max((each for each in [*ends, real.paid_until] if each is not None), default=trial_end)
            opened = open_account(self._catalogue, real.user_id, plan, real.status, start, end, real.timezone)
            brought = {meter: self._brought(opened, each, start) for meter, each in real.balances.items()}
            opened = opened._replace(balances={**opened.balances, **brought}, trust=real.trust)
        self.account = self._scheduled_as(real, opened)

    def _brought(self, opened: Account, real: Balance, start: datetime) -> Balance:
        """Return a first period with what the account brought along; one that began spent is spent here also."""
        balance = opened.balances.get(real.meter) or open_late(self._catalogue, opened, real.meter, start)
        used = (balance.allowance or 0) if real.used and real.used == real.allowance else real.used
        return balance._replace(
            used=used, rollover=real.rollover, purchased=real.purchased, carried=real.carried, grants=real.grants
        )

    def _scheduled_as(self, real: Account, account: Account) -> Account:
        """Return the account with the changes of plan that the real one was scheduled for, on the plans to try."""
        return account._replace(
            next_plan=real.next_plan and self._question.plan(real.next_plan),
            plan_change_at=real.plan_change_at,
            waiting=tuple(self._mapped(change) for change in real.waiting),
        )

    def _begin(self) -> None:
        """Change terms and plan at the start of the window, if the question changes them."""
        question, account = self._question, self.account
        plan, in_force = question.plan(account.plan), question.in_force(question.since)
        if self._differs(in_force, account, plan):
            self.account, steps = bring_up_to_date(in_force, account, question.since, None)
            self._note(steps, question.since)
            steps = []
            self.account = change_plan(self._catalogue, self.account, plan, question.since, steps)
            self._note(steps, question.since)
            account = account._replace(next_plan=None, plan_change_at=None) if plan != account.plan else account
        self.account = self._scheduled_as(account, self.account)

    def _differs(self, in_force: Catalogue, account: Account, plan: str) -> bool:
        """True if the question puts the account under other terms than those `in_force`."""
        if plan != account.plan:
            return True
        old, new = in_force.plans.get(plan), self._catalogue.plans.get(plan)
        if old is None or new is None or old.paid_by_invoice != new.paid_by_invoice:
            return old is not new
        on_trial = account.status == "trialing"
        return any(
            terms_of(in_force, plan, meter, account.timezone, on_trial=on_trial)
            != terms_of(self._catalogue, plan, meter, account.timezone, on_trial=on_trial)
            for meter in {*account.balances, *old.meters, *new.meters}
        )

    def _mapped(self, change: Waiting) -> Waiting:
        """Return a change that waits, for the plan to try."""
        return change._replace(name=self._question.plan(change.name)) if "plan" in change.kind else change

    # -- Events

    def take(self, rows: Sequence[UsageRow], moments: Sequence[datetime]) -> list[Charged | None]:
        """Charge events at these moments; return how each was paid, None for one that a wallet would refuse."""
        charged: list[Charged | None] = []
        events = [self._event(row) for row in rows]
        done = 0
        while done < len(events):
            until = self._settled_until({event.meter for event in events[done:]})
            end = done + 1
            if until is None or moments[done] < until:
                while end < len(events) and (until is None or moments[end] < until):
                    end += 1
            charged += self._charge(events[done:end], max(moments[done:end]))
            done = end
        return charged

    def _settled_until(self, meters: Collection[str]) -> datetime | None:
        """Return when the account changes by itself, or long ago if it lacks a meter; None: it does not."""
        draws = draws_of(self._catalogue, self.account.plan, self.account.status)
        used = {*meters, *(draws[meter].wallet for meter in meters if meter in draws)}
        if not used <= self.account.balances.keys():
            return self._question.since
        return first_change(self._catalogue, self.account, used)

    def _charge(self, events: list[Event], now: datetime) -> list[Charged | None]:
        self.account, writes = charge(self.account, events, now, self._catalogue)
        self._note_entries(writes.entries)
        by_event = {}
        for run in writes.usage:
            for applied in run.applied():
                payer = applied.draw.wallet if applied.draw else applied.event.meter
                balance = self.account.balances[payer]
                found = Charged(
                    payer=payer,
                    split=applied.split,
                    grants=applied.grants or {},
                    period_start=balance.counted_from,
                    is_unlimited=balance.allowance is None,
                )
                by_event[applied.event.event_id] = found
                if applied.event.event_id in self._wanted:
                    self._kept[applied.event.event_id] = found
        return [by_event.get(event.event_id) for event in events]

    def _event(self, row: UsageRow) -> Event:
        """Return the event of a row as it would come in, by multiplier and rounding of the catalogue to try."""
        multiplier, rounding = row.multiplier, self._catalogue.meters[row.meter].rounding
        model = (row.dimensions or {}).get("model_slug")
        if model is not None or multiplier != "1":
            in_force = self._question.in_force(row.applied_at)
            if model is not None and multiplier == in_force.multiplier(model):
                multiplier = self._catalogue.multiplier(model)
            # An earlier release dropped fractions, and says nothing of them.
            dropped = row.remainder is None and row.wallet is None and multiplier == row.multiplier
            if dropped and in_force.meters[row.meter].rounding == rounding == "carry":
                rounding = "down"
        amount, remainder = whole_units(row.quantity, multiplier, rounding)
        return Event(
            entry_id=_AT_THE_MOMENT,
            marked=False,
            user_id=row.user_id,
            event_id=row.event_id,
            meter=row.meter,
            quantity=row.quantity,
            multiplier=multiplier,
            amount=amount,
            occurred_at="",
            clamped=False,
            source=None,
            reference_id=None,
            hold_key=None,
            dimensions=None,  # sub-caps deny checks alone
            payload=b"",
            remainder=remainder,
        )

    # -- Entries

    def meet(self, row: EntryRow, before: Account, after: Iterable[EntryRow], moment: datetime) -> None:
        """Meet one more entry: a fact changes the account, and what follows by itself does so here by other rules.

        `before` is the real account before it. `after` are the entries that one transaction wrote after it. `moment`
        is that of the transaction; see `moment_of`.
        """
        if row.meter == "":
            self._meet_account(row, before, after, moment)
        elif row.kind == "refill":
            # A floating period begins with its use: an entry alone says when that was.
            is_use = before.balances[row.meter].anchor == "floating"
            at = datetime.fromisoformat(row.detail["until"])
            self._bring_up_to_date(at, [row.meter] if is_use else None)
        elif row.kind in ("lapse", "missing"):
            self._bring_up_to_date(datetime.fromisoformat(row.detail["at"]))
        elif row.kind == "open_meter":
            self._open_meter(row, moment)
        elif row.kind == "expire" or row.entry_key.startswith(STARTED):
            steps: list[Change] = []
            at = datetime.fromisoformat(row.detail["at"])
            self.account = cross_grants_of(self.account, at, [row.meter], steps)
            self._note(steps, at)
        elif row.kind in _CREDITED:
            self._bring_up_to_date(moment)
            self._credit(row)

    def _open_meter(self, row: EntryRow, moment: datetime) -> None:
        """Open a meter that the account lacks, at the moment at which it really was.

        An account whose first paid time is yet to begin opens the meter with that: its start may be ahead of `moment`.
        """
        if row.meter in self.account.balances:
            return
        start = balance_of(row).period_start
        self._bring_up_to_date(min(start, moment))
        if row.meter not in self.account.balances:
            opened = open_late(self._catalogue, self.account, row.meter, start)
            self.account = self.account._replace(balances={**self.account.balances, row.meter: opened})

    def _meet_account(self, row: EntryRow, before: Account, after: Iterable[EntryRow], moment: datetime) -> None:
        """Meet an entry of the account as a whole."""
        detail, kind = row.detail, row.kind
        if kind == "taken":
            self._bring_up_to_date(before.waiting[0].at)
        elif kind in ("change_plan", "set_status"):
            self._bring_up_to_date(datetime.fromisoformat(detail["at"]))
        else:
            self._bring_up_to_date(moment)
        steps: list[Change] = []
        if kind == "paid" and row.entry_key not in self._taken:
            self._renew(row)
        elif kind == "change_plan":
            plan = self._question.plan(detail["plan"])
            if plan != self.account.plan:  # else it was scheduled, and took effect by itself
                at = datetime.fromisoformat(detail["at"])
                ends_at = _provided_end(row, before, after)
                self.account = change_plan(self._catalogue, self.account, plan, at, steps, ends_at)
            self.account = self.account._replace(next_plan=None, plan_change_at=None)
        elif kind == "set_status":
            at, status = datetime.fromisoformat(detail["at"]), detail["status"]
            if status != self.account.status:
                self.account = change_status(self._catalogue, self.account, status, at, steps)
            else:
                self._copy(detail, "next_status", "status_change_at")
        elif kind == "set_period" and row.entry_key not in self._taken:
            end = datetime.fromisoformat(detail["end"])
            self.account = set_period(self.account, end, row.entry_key, steps) or self.account
        elif kind == "waits":
            self.account = waiting_with(self.account, self._mapped(Waiting.from_json(detail)))
        elif kind == "schedule":
            self._copy(detail, "next_plan", "plan_change_at", "next_status", "status_change_at")
        elif kind == "set_timezone":
            self._copy(detail, "timezone")
        elif kind == "close":
            self.account = without_schedule(self.account)._replace(status="closed", balances={})
        self._note(steps, moment)

    def _renew(self, row: EntryRow) -> None:
        """Give the invoice to the periods that it pays; without any, remember the time that it paid."""
        start, end = (datetime.fromisoformat(row.detail[name]) for name in ("period_start", "period_end"))
        invoice = Invoice(row.detail["invoice_id"], f"renew:{row.detail['invoice_id']}", start, end)
        steps: list[Change] = []
        renewed = renew_account(self._catalogue, self.account, invoice, row.created_at, steps)
        self.account = renewed or self.account._replace(paid_from=start, paid_until=end)
        self._note(steps, row.created_at)

    def _copy(self, detail: Mapping[str, Any], *names: str) -> None:
        """Take over what an entry says was scheduled."""
        values: dict[str, Any] = {name: detail.get(name) for name in names}
        for name in ("plan_change_at", "status_change_at"):
            if values.get(name):
                values[name] = datetime.fromisoformat(values[name])
        if values.get("next_plan"):
            values["next_plan"] = self._question.plan(values["next_plan"])
        self.account = self.account._replace(**values)

    # -- Credit

    def _credit(self, row: EntryRow) -> None:
        """Meet a grant, a refund, a correction or a carry-over on one meter; a meter that is not open gets nothing."""
        before = self.account.balances.get(row.meter)
        if before is None:
            return
        after, detail = self._credited(row, before)
        changed = row._replace(
            used_change=after.used - before.used,
            rollover_change=after.rollover - before.rollover,
            purchased_change=after.purchased - before.purchased,
            detail=detail,
        )
        self._feed(changed)
        if row.kind in (*GRANT_KINDS, "clawback", "adjust"):
            self._made[row.entry_key, row.meter] = changed
        self._put(after)

    def _credited(self, row: EntryRow, before: Balance) -> tuple[Balance, Mapping[str, Any]]:
        """Return the balance after an entry of credit, and the words of its entry here."""
        detail, at, kind = row.detail, row.created_at, row.kind
        if kind in GRANT_KINDS:
            grant = grant_in(row)
            if grant is None:
                return add_units(before, max(0, row.purchased_change)), detail
            return give(before, grant, to_come=kind == "grant_ahead"), detail
        if kind == "clawback":
            return self._taken_back(row, before, detail["amount"], detail.get("order"))
        if kind == "adjust":
            shift = Shift(**detail["adjusted"])
            used = grants_on(before).take_at(max(0, -shift.purchased), at, started=False)[1]
            return _not_below_zero(shifted(before, shift, at)), {**detail, "grants": used}
        if kind == "undo":
            return self._undone(row, before)
        if kind == "forgive_debt":
            return forgiven(before, min(detail["amount"], max(0, -before.rollover))), detail
        if kind == "transfer_out":
            units = min(detail.get("units", before.purchased), before.purchased)
            left, _ = move_out(before, units, at)
            debt = min(detail.get("debt", 0), max(0, -before.rollover))
            return left._replace(rollover=left.rollover + debt), detail
        if kind == "transfer_in":
            moved = detail.get("grants")
            units = detail.get("units", max(0, row.purchased_change))
            more = add_units(before, units) if moved is None else move_in(before, Grants.from_json(moved))
            return more._replace(rollover=more.rollover - detail.get("debt", 0)), detail
        if kind == "merge_grants":
            return before._replace(grants=None), detail
        return self._reversed(row, before)

    def _taken_back(
        self, row: EntryRow, before: Balance, amount: int, order: str | None
    ) -> tuple[Balance, Mapping[str, Any]]:
        bought = self._purchases_on(row.meter).orders.get(order) if order is not None else None
        taken = take_back(before, amount, row.created_at, order, bought.expired if bought else 0)
        gone = {order: taken.gone} if order is not None and taken.gone else {}
        return taken.balance, {**row.detail, "amount": amount, "grants": taken.used, "gone": gone}

    def _undone(self, row: EntryRow, before: Balance) -> tuple[Balance, Mapping[str, Any]]:
        undone = self._made.pop((row.detail["entry"], row.meter), None)
        if undone is None:
            return before, {**row.detail, "amount": 0}
        purchases = self._purchases_on(row.meter)
        facts = undoing(undone, purchases)
        if undone.kind in GRANT_KINDS:
            after, detail = self._taken_back(row, before, facts["amount"], facts["order"])
            return after, {**detail, **facts}
        back = shift_back(undone, before, purchases, row.created_at)
        return _not_below_zero(back.balance), {**row.detail, **facts, "grants": back.used, "gone": back.gone}

    def _reversed(self, row: EntryRow, before: Balance) -> tuple[Balance, Mapping[str, Any]]:
        """Put back what the event took here; of an event before the window that is what it really took."""
        detail = row.detail
        event = self._kept.pop(detail["event_id"], None) or _charged_in(row)
        if event.payer != row.meter:  # another wallet paid here
            self._give_back(event, row)
            return before, {**detail, "gone": {}}
        after, gone = _given_back(event, before, self._purchases_on(row.meter), row.created_at)
        return after, {**detail, "gone": gone}

    def _give_back(self, event: Charged, row: EntryRow) -> None:
        """Put an event back on the meter that paid here."""
        before = self.account.balances.get(event.payer)
        if before is not None:
            after, gone = _given_back(event, before, self._purchases_on(event.payer), row.created_at)
            self._feed(row._replace(meter=event.payer, detail={**row.detail, "gone": gone}))
            self._put(after)

    # -- What the account does by itself

    def _bring_up_to_date(self, at: datetime, used: Collection[str] | None = None) -> None:
        self.account, steps = bring_up_to_date(self._catalogue, self.account, at, used)
        self._note(steps, at)

    def _note(self, steps: Iterable[Change], at: datetime) -> None:
        """Note what steps say of purchases, and which invoices took effect."""
        self._note_entries([entry_of(self.account.user_id, 0, step, at) for step in steps])

    def _note_entries(self, entries: Iterable[EntryRow]) -> None:
        for entry in entries:
            if entry.meter == "" and entry.kind in ("paid", "set_period"):
                self._taken.add(entry.entry_key)
            elif entry.kind in CREDIT_KINDS:
                self._feed(entry)

    def _feed(self, entry: EntryRow) -> None:
        self._purchases[entry.meter] = after_entry(self._purchases_on(entry.meter), entry)

    def _purchases_on(self, meter: str) -> Purchases:
        return self._purchases.get(meter) or Purchases()

    def _put(self, balance: Balance) -> None:
        self.account = self.account._replace(balances={**self.account.balances, balance.meter: balance})


# Kinds of entries of one meter that are facts, and no consequence of the rules.
_CREDITED = frozenset({
    *GRANT_KINDS, "clawback", "adjust", "undo", "forgive_debt", "transfer_out", "transfer_in", "merge_grants",
    "reversal",
})  # fmt: skip


def _not_below_zero(balance: Balance) -> Balance:
    """Return the balance without used units below zero: fewer may be used here than were taken off."""
    return balance._replace(used=max(0, balance.used))


def _provided_end(row: EntryRow, before: Account, after: Iterable[EntryRow]) -> datetime | None:
    """Return the end of the period that the payment provider named with a change of plan, by its entries; else None."""
    if row.detail.get("paid_until") and row.detail["paid_from"] == row.detail["at"]:  # invoices pay the calendar
        return datetime.fromisoformat(row.detail["paid_until"])
    for each in takewhile(lambda each: each.meter, after):
        if each.kind not in ("change_plan", "open_meter"):
            continue
        balance, known = balance_of(each), before.balances.get(each.meter)
        if balance.cadence != "subscription" or balance.period_end is None:
            continue
        if known is None or known.cadence != "subscription" or known.period_end != balance.period_end:
            return balance.period_end
    return None


def _charged_in(row: EntryRow) -> Charged:
    """Return the event that a reversal puts back, as it was really paid."""
    detail = row.detail
    split = Split(**detail["parts"])
    return Charged(
        payer=row.meter,
        split=split,
        grants=detail.get("grants", {}),
        period_start=datetime.fromisoformat(detail["period_start"]),
        is_unlimited="unlimited" in detail.get("subscription_part", ""),
    )


def _given_back(
    event: Charged, before: Balance, purchases: Purchases, at: datetime
) -> tuple[Balance, Mapping[str, int]]:
    """Return a balance with the parts of an event back, and the units that are gone, by grant."""
    balance, gone, _ = put_back(before, event.used, purchases.orders, at)
    part = event.split.from_subscription
    balance = balance._replace(rollover=balance.rollover + event.split.from_rollover + event.split.overflow_to_debt)
    if event.period_start == before.counted_from:
        return balance._replace(used=max(0, balance.used - part)), gone
    parked = balance.parked
    if parked is not None and event.period_start == parked.period_start:
        return balance._replace(parked=parked._replace(used=max(0, parked.used - part))), gone
    if not part or not balance.spill or event.is_unlimited:
        return balance, gone
    return balance._replace(rollover=rolled_over(part, 0, balance.rollover, balance.rollover_cap)), gone
