"""What is told about accounts: lines that a balance reaches, and what else happens to it. Pure rules, no I/O.

A line is reached by a change: the balance was on the one side before, and is on the other after it. So an account
costs a comparison for each batch, not one for each event. A line that was reached is told again only in another
period, or after a real recovery: the balance must be a tenth away from the line, so that nothing flaps around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from config.catalogue import Catalogue, NoticeRule
from worker.rules.account import Account, Balance
from worker.rules.credits import grants_on, order_in
from worker.rules.entry_times import stream_time
from worker.rules.limits import LimitStanding
from worker.rules.received import Refused
from worker.rules.rows import Alarm, Crossing, EntryRow, Notice, Writes
from worker.rules.waterfall import available

# A recovery is real from this part of the allowance, or of the line, away from the line.
_TENTH = 10
_NOWHERE = 101
# A proof, a pause and a refusal have no rule in the catalogue: they are always told.
REFUSED, PAUSED, DIFFERS = "event.refused", "partition.paused", "proof.differs"
LIMIT_REACHED = "limit.reached"


class Line(NamedTuple):
    """A line of one meter of a plan: `percent` of the limit used, or `left` units available; neither: a debt.

    A recovery is real from `recovers_at` units available, and a tenth of the limit above the line. Of this tenth at
    most `enough` counts: a top-up that a rule names is a recovery also if it is less.
    """

    kind: str
    rule: str
    percent: int | None = None
    left: int | None = None
    top_up: int | None = None
    recovers_at: int = 1
    enough: int | None = None

    def clear_from(self, limit: int | None) -> int:
        """Return the units available from which a recovery is real."""
        tenth = _tenth(limit or 0)
        return max(self.recovers_at, (self.left or 0) + (tenth if self.enough is None else min(tenth, self.enough)))


class Lines(NamedTuple):
    """The rules of one meter of a plan.

    While less than `first_percent` of the limit is used, and more than `highest_left` units of it are left, no line is
    near: this is the one comparison that a batch costs an account.
    """

    lines: tuple[Line, ...]
    kinds: frozenset[str]
    days_before: tuple[int, ...]
    first_percent: int
    highest_left: int

    def are_far_from(self, balance: Balance, status: str) -> bool:
        """True if surely no line is reached: what is left of the allowance alone says so."""
        if LIMIT_REACHED in self.kinds and balance.limits is not None and any(_limits_reached(balance)):
            return False
        limit = balance.limit(status)
        if limit is None:
            return balance.rollover >= 0
        used = balance.used
        return used * 100 < self.first_percent * limit and limit - used > self.highest_left and balance.rollover >= 0


def lines_of(rules: Sequence[NoticeRule], meter: str) -> Lines | None:
    """Return the lines that rules draw on a meter; None without any. A rule for the meter goes before one for all."""
    chosen: dict[str, NoticeRule] = {}
    for rule in sorted(rules, key=lambda each: each.meter is not None):
        if rule.meter in (None, meter):
            chosen[rule.name] = rule
    if not chosen:
        return None
    highest = max((rule.left for rule in chosen.values() if rule.left is not None), default=0)
    least = min((_half(rule.top_up) for rule in chosen.values() if rule.left is not None and rule.top_up), default=None)
    lines = []
    for name, rule in chosen.items():
        if rule.percent is not None:
            lines.append(Line(rule.kind, name, percent=rule.percent, top_up=rule.top_up))
        elif rule.left is not None:
            enough = _half(rule.top_up) if rule.top_up else None
            above = max(1, _tenth(rule.left))
            near = rule.left + (above if enough is None else min(above, enough))
            lines.append(Line(rule.kind, name, left=rule.left, top_up=rule.top_up, recovers_at=near, enough=enough))
        elif rule.kind == "balance.depleted":
            lines.append(Line(rule.kind, name, left=0, recovers_at=highest + 1, enough=least))
        elif rule.kind == "balance.debt":
            lines.append(Line(rule.kind, name, recovers_at=highest + 1, enough=least))
    if "balance.recovered" in chosen and "balance.depleted" not in chosen:
        lines.append(Line("", "balance.depleted", left=0, recovers_at=highest + 1, enough=least))
    # Warnings come before what they warn of.
    lines.sort(key=lambda line: (line.percent is None, line.left is None, line.percent or 0, -(line.left or 0)))
    return Lines(
        lines=tuple(lines),
        kinds=frozenset(rule.kind for rule in chosen.values()),
        days_before=tuple(sorted(rule.days_before for rule in chosen.values() if rule.days_before is not None)),
        first_percent=min((line.percent for line in lines if line.percent is not None), default=_NOWHERE),
        highest_left=max((line.left for line in lines if line.left is not None), default=-1),
    )


class Watch:
    """The lines of a catalogue's plans, worked out once for a batch."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._lines: dict[tuple[str, str], Lines | None] = {}

    def is_idle(self, account: Account) -> bool:
        """True if nothing is ever told of the account."""
        return not self._rules(account)

    def are_others(self, before: Account, after: Account) -> bool:
        """True if other rules are in force after a change than before it."""
        return (before.plan, before.notices) != (after.plan, after.notices) and self._rules(before) != self._rules(
            after
        )

    def lines(self, account: Account, meter: str) -> Lines | None:
        """Return the lines of a meter of an account; None without any."""
        if account.notices is not None:
            return lines_of(self._rules(account), meter)
        key = account.plan, meter
        if key not in self._lines:
            self._lines[key] = lines_of(self._rules(account), meter)
        return self._lines[key]

    def _rules(self, account: Account) -> Sequence[NoticeRule]:
        if account.notices is None:
            return self._catalogue.notice_rules(account.plan)
        return [rule for rule in account.notices if isinstance(rule, NoticeRule)]


def tell_usage(
    writes: Writes, watch: Watch, before: Account, after: Account, used: Collection[str], now: datetime
) -> None:
    """Put into `writes` the lines that usage of these meters reached, from one version of an account to a later one.

    Only of an account that crossed no boundary: usage raises no balance, so nothing recovers.
    """
    for meter in used:
        lines = watch.lines(after, meter)
        if lines is not None and not lines.are_far_from(after.balances[meter], after.status):
            writes.crossings.extend(_crossings(lines, before, after, meter, now))


def tell_change(
    writes: Writes, watch: Watch, before: Account, after: Account, entries: Sequence[EntryRow], now: datetime
) -> None:
    """Put into `writes` all that is to be told of a change of an account, which made these ledger entries."""
    if watch.is_idle(after) or after.status == "closed":
        return
    is_anew = watch.are_others(before, after)
    for meter, balance in after.balances.items():
        lines = watch.lines(after, meter)
        if lines is None:
            continue
        earlier = before.balances.get(meter)
        if balance != earlier or after.status != before.status or is_anew:
            writes.crossings.extend(_crossings(lines, before, after, meter, now, is_anew=is_anew))
        if lines.days_before and (earlier is None or balance.grants != earlier.grants):
            writes.notices.extend(_expiring(lines, after, earlier, balance, now))
    for entry in entries:
        lines = watch.lines(after, entry.meter) if entry.meter else None
        if lines is not None:
            writes.notices.extend(_of_entry(lines, after, entry, now))


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _crossings(
    lines: Lines, before: Account, after: Account, meter: str, now: datetime, *, is_anew: bool = False
) -> Iterator[Crossing]:
    """Yield the lines reached or left. With `is_anew` other rules held before: a line may have been left unwatched."""
    earlier, balance = before.balances.get(meter), after.balances[meter]
    if LIMIT_REACHED in lines.kinds:
        yield from _limit_crossings(before, after, meter, now, is_anew=is_anew)
    opening = _opening(earlier, balance)
    opened_as = before.status if opening is earlier else after.status
    for line in lines.lines:
        period = balance.counted_from.isoformat()
        if _is_reached(line, balance, after.status):
            # What the last period left counts also: a new one may begin with nothing, its invoice missing.
            is_known = earlier is None or opening is earlier or _is_reached(line, earlier, before.status)
            if not (is_known and _is_reached(line, opening, opened_as)):
                told = _told(line, after, balance, now) if line.kind else None
                yield Crossing(after.user_id, meter, line.rule, period, is_reached=True, told=told)
        elif (
            earlier is not None
            and _is_clear(line, balance, after.status)
            and (is_anew or not _is_clear(line, earlier, before.status))
        ):
            recovers = line.rule == "balance.depleted" and "balance.recovered" in lines.kinds
            told = _recovered(after, balance, now) if recovers else None
            yield Crossing(after.user_id, meter, line.rule, period, is_reached=False, told=told)


def _limit_crossings(
    before: Account, after: Account, meter: str, now: datetime, *, is_anew: bool = False
) -> Iterator[Crossing]:
    """Yield the limits per window that were reached or left. A limit is told once in a window, until it recovers."""
    earlier, balance = before.balances.get(meter), after.balances[meter]
    known = {(each.per, each.set_by): each for each in _standings(earlier)}
    for each in _standings(balance):
        was = known.get((each.per, each.set_by))
        if was is not None and was.starts_at != each.starts_at:
            was = None  # another window
        assert each.starts_at is not None, "the window is open"
        rule, period = f"{LIMIT_REACHED}:per={each.per},of={each.set_by}", each.starts_at.isoformat()
        if each.used >= each.amount:
            if was is None or was.used < was.amount:
                told = _limit_reached(after, balance, each, rule, now)
                yield Crossing(after.user_id, meter, rule, period, is_reached=True, told=told)
        elif was is not None and _has_room(each) and (is_anew or not _has_room(was)):
            yield Crossing(after.user_id, meter, rule, period, is_reached=False, told=None)


def _standings(balance: Balance | None) -> Sequence[LimitStanding]:
    return () if balance is None or balance.limits is None else balance.limits.standings()


def _limits_reached(balance: Balance) -> Iterator[bool]:
    return (each.used >= each.amount for each in _standings(balance))


def _has_room(standing: LimitStanding) -> bool:
    """True if a tenth of a limit is left, so that it has really recovered."""
    return standing.used <= standing.amount - _tenth(standing.amount)


def _limit_reached(account: Account, balance: Balance, standing: LimitStanding, rule: str, now: datetime) -> Notice:
    facts = {
        "plan": account.plan,
        "status": account.status,
        "per": standing.per,
        "set_by": standing.set_by,
        "limit": standing.amount,
        "used": standing.used,
        "period_start": standing.starts_at,
        "period_end": standing.ends_at,
    }
    assert standing.starts_at is not None
    period = standing.starts_at.isoformat()
    return _notice(account.user_id, balance.meter, LIMIT_REACHED, rule, period, now, facts)


def _opening(earlier: Balance | None, balance: Balance) -> Balance:
    """Return the balance from which the open period was used: that before, or as the period began."""
    if earlier is None:
        return balance._replace(used=0, rollover=max(0, balance.rollover))
    if earlier.counted_from == balance.counted_from:
        return earlier
    return balance._replace(
        used=0,
        rollover=max(earlier.rollover, balance.rollover),
        purchased=max(earlier.purchased, balance.purchased),
    )


def _is_reached(line: Line, balance: Balance, status: str) -> bool:
    if line.percent is not None:
        limit = balance.limit(status)
        return limit is not None and limit > 0 and balance.used * 100 >= line.percent * limit
    if line.left is not None:
        units = available(balance.buckets(status), 0)
        return units is not None and units <= line.left
    return balance.rollover < 0


def _is_clear(line: Line, balance: Balance, status: str) -> bool:
    """True if the balance is so far from the line that it has really recovered."""
    limit = balance.limit(status)
    if line.percent is not None:
        return limit is None or (limit > 0 and balance.used * 100 <= max(0, line.percent - _TENTH) * limit)
    if line.left is None and balance.rollover < 0:
        return False
    units = available(balance.buckets(status), 0)
    return units is None or units >= line.clear_from(limit)


def _tenth(units: int) -> int:
    return -(-units // _TENTH)


def _half(units: int) -> int:
    return -(-units // 2)


def _told(line: Line, account: Account, balance: Balance, now: datetime) -> Notice:
    facts = {
        **_facts(account, balance),
        "percent": line.percent,
        "left": line.left if line.kind != "balance.depleted" else None,
    }
    if line.kind == "balance.threshold" and balance.spill:
        facts["suggested"] = line.top_up or _suggested(line, balance, account.status)
    return _notice(account.user_id, balance.meter, line.kind, line.rule, balance.counted_from.isoformat(), now, facts)


def _suggested(line: Line, balance: Balance, status: str) -> int:
    """Return the units of a top-up that no rule names: what was used of the allowance, or what makes a recovery."""
    if line.percent is not None:
        return max(1, balance.used)
    units = available(balance.buckets(status), 0) or 0
    return max(1, line.clear_from(balance.limit(status)) - units - min(0, balance.rollover))


def _recovered(account: Account, balance: Balance, now: datetime) -> Notice:
    period = balance.counted_from.isoformat()
    kind = "balance.recovered"
    return _notice(account.user_id, balance.meter, kind, kind, period, now, _facts(account, balance))


def _facts(account: Account, balance: Balance) -> dict[str, Any]:
    return {
        "plan": account.plan,
        "status": account.status,
        "used": balance.used,
        "limit": balance.limit(account.status),
        "rollover": balance.rollover,
        "purchased": balance.purchased,
        "available": available(balance.buckets(account.status), 0),
        "period_start": balance.period_start,
        "period_end": balance.period_end,
    }


def tell(
    crossings: Sequence[Crossing], alarms: Mapping[tuple[str, str, str], Alarm]
) -> tuple[list[Notice], dict[tuple[str, str, str], Alarm]]:
    """Return the notices of crossings, in their order, and the alarms that they change.

    `alarms` are those of their accounts, by user, meter and rule. A line with an open alarm of the period is not told
    again; a recovery without an open alarm is none.
    """
    notices: list[Notice] = []
    changed: dict[tuple[str, str, str], Alarm] = {}
    for crossing in crossings:
        key = crossing.user_id, crossing.meter, crossing.rule
        alarm = changed.get(key) or alarms.get(key)
        if crossing.is_reached:
            same = alarm is not None and alarm.period == crossing.period
            if alarm is not None and same and alarm.is_open:
                continue
            times = alarm.times + 1 if alarm is not None and same else 1
            changed[key] = Alarm(crossing.period, times, is_open=True)
        elif alarm is not None and alarm.is_open:
            times = alarm.times
            changed[key] = alarm._replace(is_open=False)
        else:
            continue
        if crossing.told is not None:
            told = crossing.told
            # A recovery is that of the alarm, whatever period it comes in.
            period = crossing.period if crossing.is_reached else changed[key].period
            notices.append(told._replace(times=times, period=period))
    return notices, changed


# ---------------------------------------------------------------------------------------------------------------------
# What else happens to an account


def _of_entry(lines: Lines, account: Account, entry: EntryRow, now: datetime) -> Iterator[Notice]:
    """Yield what a ledger entry tells: its key makes it happen once."""
    detail, kinds = entry.detail, lines.kinds
    if entry.kind in ("refill", "renewal") and "period.renewed" in kinds:
        kind, facts = "period.renewed", {"limit": detail.get("allowance"), "used": entry.used_after}
        facts |= {"period_start": detail.get("period_start"), "period_end": detail.get("period_end")}
    elif entry.kind in ("lapse", "missing") and detail.get("backing") == "missing" and "renewal.missing" in kinds:
        kind, facts = "renewal.missing", {"period_start": detail.get("period_start")}
    elif entry.kind == "expire" and "grant.expired" in kinds:
        kind, facts = "grant.expired", {"order": order_in(entry.entry_key), "units": detail["units"]}
    else:
        return
    facts |= {"plan": account.plan, "status": account.status}
    yield _notice(account.user_id, entry.meter, kind, kind, entry.entry_key, now, facts)


def _expiring(
    lines: Lines, account: Account, before: Balance | None, after: Balance, now: datetime
) -> Iterator[Notice]:
    """Yield a notice, due some days before it ends, for each grant that is new to a balance."""
    known = {grant.key for part in grants_on(before) for grant in part} if before is not None else set()
    for grant in (grant for part in grants_on(after) for grant in part):
        if grant.key in known or grant.expires_at is None or grant.expires_at <= now:
            continue
        for days in lines.days_before:
            due_at = max(now, grant.expires_at - timedelta(days=days))
            facts = {"order": grant.key, "units": grant.left, "expires_at": grant.expires_at, "plan": account.plan}
            period = f"{grant.key}:{grant.expires_at.isoformat()}"
            rule = f"grant.expiring:days_before={days}"
            yield _notice(account.user_id, after.meter, "grant.expiring", rule, period, now, facts)._replace(
                due_at=due_at
            )


# ---------------------------------------------------------------------------------------------------------------------
# What no rule of the catalogue asks for


def tell_refusals(writes: Writes, now: datetime) -> None:
    """Put into `writes` a notice for each user, meter and reason of its dead letters: once a day of their entries.

    A batch that is repeated after midnight tells nothing again. They come in the order of their ids: batches of two
    partitions may be about one user, and none waits for the other while that one waits for it.
    """
    told: dict[str, Notice] = {}
    for refused in writes.refused:
        if refused.owner is not None:
            user_id, meter, event_id = refused.owner
            notice = _refused(user_id, meter, event_id, refused, now)
            told.setdefault(notice.notice_id, notice)
    writes.notices.extend(told[notice_id] for notice_id in sorted(told))


def _refused(user_id: str, meter: str, event_id: str, refused: Refused, now: datetime) -> Notice:
    facts = {"event_id": event_id, "reason": refused.reason.value}
    day = stream_time(refused.entry_id, now).date()
    period = f"{day.isoformat()}:{refused.reason.value}"
    return _notice(user_id, meter, REFUSED, REFUSED, period, now, facts)


def paused(partition: int | str, by: str, reason: str, at: datetime) -> Notice:
    """Return the notice of the pause of a partition, for operators."""
    facts = {"partition": partition, "by": by, "reason": reason}
    return _notice("", "", PAUSED, PAUSED, f"{partition}:{at.isoformat()}", at, facts)


def differs(run: int, differences: int, first: str, now: datetime) -> Notice:
    """Return the notice of a proof with differences, for operators; `first` is the first of them."""
    return _notice("", "", DIFFERS, DIFFERS, str(run), now, {"differences": differences, "text": first})


def _notice(
    user_id: str, meter: str, kind: str, rule: str, period: str, now: datetime, facts: Mapping[str, Any]
) -> Notice:
    kept = {name: value for name, value in facts.items() if value is not None}
    return Notice(user_id, meter, kind, rule, period, 1, now, now, kept)
