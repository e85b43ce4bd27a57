"""What is told of an account: golden cases by hand, and a model that knows nothing of our code.

The model walks through the balances one by one and keeps, for each line, whether it was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.catalogue import Catalogue, CatalogueError, NoticeRule, load_catalogue, parse_catalogue
from config.settings import DEFAULT_CATALOGUE
from schemas.events import Refusal
from worker.rules.account import Account, Balance
from worker.rules.entry_times import milliseconds_at
from worker.rules.grants import Grant, Grants
from worker.rules.limits import Limits, Window
from worker.rules.notices import Watch, differs, paused, tell, tell_change, tell_refusals, tell_usage
from worker.rules.received import Refused
from worker.rules.rows import Alarm, Crossing, EntryRow, Notice, Writes

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
METER = "premium_voice"
SHIPPED = load_catalogue(DEFAULT_CATALOGUE)

ALL_OF_A_BALANCE = (
    {"kind": "balance.threshold", "percent": 80},
    {"kind": "balance.threshold", "left": 50, "top_up": 500},
    {"kind": "balance.depleted"},
    {"kind": "balance.recovered"},
    {"kind": "balance.debt"},
)


def catalogue(*rules: dict[str, Any]) -> Catalogue:
    """The shipped catalogue with these rules on `basic`."""
    plan = SHIPPED.plans["basic"].model_copy(update={"notices": tuple(map(NoticeRule.model_validate, rules))})
    return SHIPPED.model_copy(update={"plans": {**SHIPPED.plans, "basic": plan}})


def balance(
    used: int = 0, limit: int | None = 1_000, rollover: int = 0, purchased: int = 0, period: int = 0,
    *, spill: bool = True, grants: Grants | None = None,
) -> Balance:  # fmt: skip
    """A balance in a period that began so many days after NOW."""
    start = NOW + period * DAY
    return Balance(
        METER, limit, spill, 0, None, "monthly", "sticky", None, start, 0, start, start + 30 * DAY, None, start, used,
        rollover, purchased, grants=grants,
    )  # fmt: skip


def account(found: Balance | None, status: str = "active", version: int = 1, **fields: Any) -> Account:
    return Account("u", "basic", status, "new", version, {METER: found} if found else {}, **fields)


def walk(rules: Sequence[dict[str, Any]], *balances: Balance | Account) -> list[tuple[str, str, int]]:
    """What is told while an account goes through these balances, one batch each: kind, line, times."""
    return [(each.kind, each.rule.partition(":")[2], each.times) for each in walked(rules, *balances)]


def walked(rules: Sequence[dict[str, Any]], *balances: Balance | Account) -> list[Notice]:
    watch, alarms, told = Watch(catalogue(*rules)), dict[tuple[str, str, str], Alarm](), list[Notice]()
    accounts = [each if isinstance(each, Account) else account(each) for each in balances]
    for before, after in pairwise(accounts):
        writes = Writes.none()
        tell_change(writes, watch, before, after, [], NOW)
        new, changed = tell(writes.crossings, alarms)
        alarms |= changed
        told += [*writes.notices, *new]
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Lines


GOLDEN: list[tuple[list[Any], list[tuple[str, str, int]]]] = [
    # The first unit on the line tells, the one before it does not, and no unit after it.
    ([balance(0), balance(799), balance(800), balance(900)], [("balance.threshold", "percent=80", 1)]),
    ([balance(0), balance(949)], [("balance.threshold", "percent=80", 1)]),
    (
        [balance(0), balance(950)],
        [("balance.threshold", "percent=80", 1), ("balance.threshold", "left=50", 1)],
    ),
    # One batch may reach several lines.
    (
        [balance(0), balance(1_000, rollover=-1)],
        [
            ("balance.threshold", "percent=80", 1),
            ("balance.threshold", "left=50", 1),
            ("balance.depleted", "", 1),
            ("balance.debt", "", 1),
        ],
    ),
    # A unit given back and used again does not tell again; nor does anything short of a tenth of the allowance.
    (
        [balance(900), balance(1_000), balance(999), balance(1_000), balance(901), balance(1_000)],
        [("balance.threshold", "left=50", 1), ("balance.depleted", "", 1)],
    ),
    # A real recovery is told once, and the line may be reached again.
    (
        [
            balance(900), balance(1_000), balance(1_000, purchased=500), balance(1_000, purchased=400),
            balance(1_000), balance(1_000, purchased=500),
        ],
        [
            ("balance.threshold", "left=50", 1), ("balance.depleted", "", 1), ("balance.recovered", "", 1),
            ("balance.threshold", "left=50", 2), ("balance.depleted", "", 2), ("balance.recovered", "", 2),
        ],
    ),
    # What was saved or bought counts for what is left, and not for the percentage used.
    ([balance(0, purchased=500), balance(1_000, purchased=500)], [("balance.threshold", "percent=80", 1)]),
    # A new period begins anew, in one batch or in two.
    (
        [balance(0), balance(1_000), balance(0, period=30), balance(800, period=30)],
        [
            ("balance.threshold", "percent=80", 1), ("balance.threshold", "left=50", 1), ("balance.depleted", "", 1),
            ("balance.recovered", "", 1), ("balance.threshold", "percent=80", 1),
        ],
    ),
    (
        [balance(0), balance(1_000), balance(1_000, period=30)],
        [
            ("balance.threshold", "percent=80", 1), ("balance.threshold", "left=50", 1), ("balance.depleted", "", 1),
            ("balance.threshold", "percent=80", 1), ("balance.threshold", "left=50", 1), ("balance.depleted", "", 1),
        ],
    ),
    # An account that never has anything is not told so with each period.
    ([balance(0, limit=0), balance(0, limit=0, period=1), balance(0, limit=0, period=2)], []),
    # Debt that eats the new allowance: nothing was reached by this period.
    ([balance(0, limit=100, rollover=-200), balance(0, limit=100, rollover=-100, period=1)], []),
    # Without a limit nothing is ever near; a debt from before is known already.
    ([balance(0, limit=None), balance(10**9, limit=None)], []),
    # A period that begins with nothing, as its invoice is missing, and one with less than the line.
    (
        [balance(100), balance(0, limit=0, period=30), balance(0, limit=0, period=60), balance(0, period=90)],
        [("balance.threshold", "left=50", 1), ("balance.depleted", "", 1), ("balance.recovered", "", 1)],
    ),
    ([balance(100), balance(0, limit=40, period=30)], [("balance.threshold", "left=50", 1)]),
    # The top-up that the rule names is a recovery, though it is less than a tenth of the allowance.
    (
        [
            balance(9_000, limit=10_000), balance(9_960, limit=10_000), balance(9_960, limit=10_000, purchased=500),
            balance(10_000, limit=10_000, purchased=30), balance(10_000, limit=10_000, purchased=29),
        ],
        [("balance.threshold", "left=50", 1), ("balance.threshold", "left=50", 2)],
    ),
    # A unit of it given back is none.
    (
        [balance(9_000, limit=10_000), balance(9_960, limit=10_000), balance(9_800, limit=10_000),
         balance(9_960, limit=10_000)],
        [("balance.threshold", "left=50", 1)],
    ),
    # An account that is not entitled any more has nothing to spend.
    (
        [account(balance(100)), account(balance(100), status="canceled")],
        [("balance.threshold", "left=50", 1), ("balance.depleted", "", 1)],
    ),
    # A meter that is used for the first time.
    ([account(None), account(balance(900))], [("balance.threshold", "percent=80", 1)]),
    # Nothing spills: only the limit counts.
    (
        [balance(0, spill=False), balance(1_200, spill=False)],
        [
            ("balance.threshold", "percent=80", 1), ("balance.threshold", "left=50", 1), ("balance.depleted", "", 1),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("balances", "told"), GOLDEN)
def test_a_line_is_told_when_it_is_reached(balances: list[Any], told: list[tuple[str, str, int]]) -> None:
    assert sorted(walk(ALL_OF_A_BALANCE, *balances)) == sorted(told)


def test_a_threshold_carries_what_a_top_up_needs() -> None:
    percent, low = walked(
        [{"kind": "balance.threshold", "left": 50, "top_up": 500}, {"kind": "balance.threshold", "percent": 80}],
        balance(0), balance(960, rollover=-10),
    )  # fmt: skip
    assert low.data["suggested"] == 500
    assert percent.data["suggested"] == 960, "a rule without an amount suggests what was used"
    assert low.notice_id != percent.notice_id
    assert {**low.data}.items() >= {"used": 960, "limit": 1_000, "rollover": -10, "available": 30, "left": 50}.items()
    (without,) = walked([{"kind": "balance.threshold", "left": 50}], balance(0), balance(960))
    after = balance(960, purchased=without.data["suggested"])
    assert walk([{"kind": "balance.threshold", "left": 50}], balance(0), balance(960), after, balance(960)) == [
        ("balance.threshold", "left=50", 1),
        ("balance.threshold", "left=50", 2),
    ], "the suggestion is a real recovery"
    (capped,) = walked([{"kind": "balance.threshold", "left": 50}], balance(0, spill=False), balance(960, spill=False))
    assert "suggested" not in capped.data, "such a meter takes no grants"


def test_the_same_change_has_the_same_id_whoever_works_it_out() -> None:
    first, again = (walked(ALL_OF_A_BALANCE, balance(0), balance(850)) for _ in range(2))
    assert [each.notice_id for each in first] == [each.notice_id for each in again]
    twice = walked(ALL_OF_A_BALANCE, balance(900), *[balance(1_000), balance(1_000, purchased=500)] * 2)
    assert len({each.notice_id for each in twice}) == len(twice) == 6


def test_a_rule_for_a_meter_goes_before_one_for_all() -> None:
    rules = [
        {"kind": "balance.threshold", "percent": 80, "top_up": 1},
        {"kind": "balance.threshold", "percent": 80, "top_up": 2, "meter": METER},
        {"kind": "balance.threshold", "percent": 10, "meter": "ocr_tokens"},
    ]
    (told,) = walked(rules, balance(0), balance(900))
    assert told.data["suggested"] == 2


def test_rules_of_an_account_are_in_force_instead_of_the_plans() -> None:
    own = (NoticeRule.model_validate({"kind": "balance.threshold", "percent": 10}),)
    for rules, told in ((own, [("balance.threshold", "percent=10", 1)]), ((), [])):
        steps = account(balance(0), notices=rules), account(balance(900), notices=rules)
        assert walk(ALL_OF_A_BALANCE, *steps) == told


def test_a_recovery_while_no_rule_watched_lets_a_line_be_told_again() -> None:
    """Else an automatic top-up would stop until the next period."""
    for nothing in ({"notices": ()}, {"notices": (NoticeRule(kind="period.renewed"),)}):
        low, none, full = (
            balance(960),
            account(balance(960), **nothing),
            account(balance(960, purchased=500), **nothing),
        )
        steps = balance(0), low, none, full, balance(960, purchased=500), balance(1_000, purchased=200), low
        rules = [{"kind": "balance.threshold", "left": 50}]
        assert walk(rules, *steps) == [("balance.threshold", "left=50", 1), ("balance.threshold", "left=50", 2)]
        unwatched = balance(0), low, none, low, balance(961)
        assert len(walk(rules, *unwatched)) == 1, "nothing recovered"


def limited(spent: int, day: int = 0, amounts: dict[Any, dict[Any, int]] | None = None) -> Balance:
    """A balance with limits per day, whose window began so many days after NOW and has used so much."""
    starts = NOW + day * DAY
    amounts = amounts or {"operator": {"day": 100}}
    return balance(spent)._replace(limits=Limits(amounts, {"day": Window(starts, starts + DAY, 0, spent)}))


OF_OPERATOR, OF_USER = "per=day,of=operator", "per=day,of=user"
BOTH = {"operator": {"day": 100}, "user": {"day": 50}}


@pytest.mark.parametrize(
    ("balances", "told"),
    [
        # The first unit on the limit tells, and none after it; the next window tells again.
        ([limited(99), limited(100), limited(101), limited(100, day=1)], [(OF_OPERATOR, 1), (OF_OPERATOR, 1)]),
        ([limited(100), limited(150), limited(100, day=1), limited(120, day=1)], [(OF_OPERATOR, 1)]),
        # A unit given back tells nothing; a tenth of the limit is a recovery.
        ([limited(0), limited(100), limited(91), limited(100)], [(OF_OPERATOR, 1)]),
        ([limited(0), limited(100), limited(90), limited(100)], [(OF_OPERATOR, 1), (OF_OPERATOR, 2)]),
        # Each limit by itself.
        ([limited(0, amounts=BOTH), limited(60, amounts=BOTH)], [(OF_USER, 1)]),
        ([limited(0, amounts=BOTH), limited(100, amounts=BOTH)], [(OF_USER, 1), (OF_OPERATOR, 1)]),
        # One that is set below what is used is reached at once; a higher one is a recovery.
        ([balance(60), limited(60, amounts={"user": {"day": 50}})], [(OF_USER, 1)]),
        (
            [limited(0), limited(100), limited(100, amounts={"operator": {"day": 200}}), limited(200)],
            [(OF_OPERATOR, 1), (OF_OPERATOR, 2)],
        ),
    ],
)
def test_a_limit_is_told_once_in_its_window(balances: list[Balance], told: list[tuple[str, int]]) -> None:
    rules = ({"kind": "limit.reached"},)
    assert [(line, times) for _, line, times in walk(rules, *balances)] == told
    assert walk([{"kind": "balance.depleted"}], *balances) == []
    assert walk([{"kind": "limit.reached", "meter": "ocr_tokens"}], *balances) == []


def test_what_a_limit_tells_names_it_and_its_window() -> None:
    (told,) = walked([{"kind": "limit.reached"}], limited(0), limited(130))
    assert (told.kind, told.period) == ("limit.reached", NOW.isoformat())
    assert told.data == {
        "plan": "basic", "status": "active", "per": "day", "set_by": "operator", "limit": 100, "used": 130,
        "period_start": NOW, "period_end": NOW + DAY,
    }  # fmt: skip


def test_usage_alone_tells_of_limits_also() -> None:
    watch, writes = Watch(catalogue({"kind": "limit.reached"})), Writes.none()
    for before, after in pairwise([limited(0), limited(99), limited(100)]):
        tell_usage(writes, watch, account(before), account(after), [METER], NOW)
    assert [each.rule for each in writes.crossings] == [f"limit.reached:{OF_OPERATOR}"]


def test_usage_alone_tells_what_the_whole_look_tells() -> None:
    watch = Watch(catalogue(*ALL_OF_A_BALANCE))
    for before, after in ((balance(0), balance(850)), (balance(0), balance(100)), (balance(900), balance(1_000))):
        quick, whole = Writes.none(), Writes.none()
        tell_usage(quick, watch, account(before), account(after), [METER], NOW)
        tell_change(whole, watch, account(before), account(after), [], NOW)
        assert quick.crossings == whole.crossings


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Model:
    """What each line has told so far. Written from the words of docs/credits-notices.md, not from the code."""

    def __init__(self, percents: Sequence[int], lefts: Sequence[int]) -> None:
        self.open: dict[object, datetime] = {}
        self.times: dict[tuple[object, datetime], int] = {}
        self.percents, self.lefts = percents, lefts

    def step(self, old: Balance, new: Balance) -> list[tuple[str, str, int]]:
        told = []
        begun = old
        if old.period_start != new.period_start:  # as the period began: nothing used of it
            begun = new._replace(
                used=0, rollover=max(old.rollover, new.rollover), purchased=max(old.purchased, new.purchased)
            )
        for line in [*(("p", each) for each in self.percents), *(("l", each) for each in self.lefts), ("d", 0)]:
            if self.over(line, new):
                if not (self.over(line, begun) and self.over(line, old)) and self.open.get(line) != new.period_start:
                    self.open[line] = new.period_start
                    times = self.times[line, new.period_start] = self.times.get((line, new.period_start), 0) + 1
                    told.append((*self.name(line), times))
            elif self.safe(line, new) and not self.safe(line, old) and line in self.open:
                since = self.open.pop(line)
                if line == ("l", 0):
                    told.append(("balance.recovered", "", self.times[line, since]))
        return told

    @staticmethod
    def units(found: Balance) -> int:
        assert found.allowance is not None
        return max(0, max(0, found.allowance - found.used) + found.rollover + found.purchased)

    def over(self, line: tuple[str, int], found: Balance) -> bool:
        kind, value = line
        if kind == "p":
            return bool(found.allowance) and 100 * found.used >= value * (found.allowance or 0)
        return found.rollover < 0 if kind == "d" else self.units(found) <= value

    def safe(self, line: tuple[str, int], found: Balance) -> bool:
        kind, value = line
        limit = found.allowance or 0
        tenth = (limit + 9) // 10
        if kind == "p":
            return limit > 0 and 100 * found.used <= max(0, value - 10) * limit
        if kind == "d" and found.rollover < 0:
            return False
        warned = max([each for each in self.lefts if each], default=0)
        least = value + max(1, (value + 9) // 10) if value else warned + 1
        return self.units(found) >= max(least, value + tenth)

    @staticmethod
    def name(line: tuple[str, int]) -> tuple[str, str]:
        kind, value = line
        if kind == "p":
            return "balance.threshold", f"percent={value}"
        if kind == "d":
            return "balance.debt", ""
        return ("balance.threshold", f"left={value}") if value else ("balance.depleted", "")


@given(
    st.lists(
        st.tuples(
            st.integers(0, 130), st.sampled_from([0, 1, 40, 100]), st.integers(-60, 60), st.integers(0, 60),
            st.booleans(),
        ),
        min_size=2, max_size=12,
    ),
    st.sets(st.integers(1, 100), max_size=3),
    st.sets(st.integers(1, 80), max_size=2),
)  # fmt: skip
def test_the_model_tells_the_same(
    drawn: list[tuple[int, int, int, int, bool]], percents: set[int], lefts: set[int]
) -> None:
    rules: list[dict[str, Any]] = [{"kind": "balance.threshold", "percent": each} for each in percents]
    rules += [{"kind": "balance.threshold", "left": each} for each in lefts]
    rules += [{"kind": kind} for kind in ("balance.depleted", "balance.recovered", "balance.debt")]
    period, balances = 0, []
    for used, limit, rollover, purchased, is_new in drawn:
        period += is_new
        balances.append(balance(used, limit, rollover, purchased, period))
    model = Model(sorted(percents), [*sorted(lefts), 0])
    expected = [told for old, new in pairwise(balances) for told in model.step(old, new)]
    assert sorted(walk(rules, *balances)) == sorted(expected)


# ---------------------------------------------------------------------------------------------------------------------
# What else is told


def entry(kind: str, key: str, **detail: Any) -> EntryRow:
    return EntryRow("u", 1, key, METER, kind, 0, 0, 0, 0, 0, 0, detail, NOW, None, None)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (entry("refill", "refill:2026", allowance=5), "period.renewed"),
        (entry("renewal", "renew:in_1", allowance=5), "period.renewed"),
        (entry("missing", "missing:1", backing="missing"), "renewal.missing"),
        (entry("lapse", "lapse:1", backing="missing"), "renewal.missing"),
        (entry("lapse", "lapse:1", backing="grace"), None),
        (entry("expire", "expire:order-1", units=7), "grant.expired"),
        (entry("adjust", "adjust:1"), None),
    ],
)
def test_an_entry_tells_once_what_it_is(row: EntryRow, told: str | None) -> None:
    rules = [{"kind": kind} for kind in ("period.renewed", "renewal.missing", "grant.expired")]
    for wanted in (rules, [rule for rule in rules if rule["kind"] != told]):
        writes, both = Writes.none(), account(balance())
        tell_change(writes, Watch(catalogue(*wanted)), both, both, [row], NOW)
        assert [each.kind for each in writes.notices] == ([told] if told and wanted is rules else [])
    if told == "grant.expired":
        writes = Writes.none()
        tell_change(writes, Watch(catalogue(*rules)), both, both, [row], NOW)
        assert writes.notices[0].data.items() >= {"order": "order-1", "units": 7}.items()


def grant(key: str, days: int | None) -> Grant:
    return Grant(key, 100, 100, "paid", 50, NOW, None if days is None else NOW + days * DAY, NOW)


def test_the_end_of_a_grant_is_told_some_days_before_it() -> None:
    rules: list[dict[str, Any]] = [{"kind": "grant.expiring"}, {"kind": "grant.expiring", "days_before": 30}]
    given_now = Grants((grant("far", 90), grant("near", 3), grant("never", None), grant("over", 0)))
    before, after = balance(), balance(purchased=400, grants=given_now)
    told = walked(rules, before, after, after)
    due = {(each.data["order"], each.rule): (each.due_at - NOW).days for each in told}
    assert due == {
        ("far", "grant.expiring:days_before=7"): 83,
        ("far", "grant.expiring:days_before=30"): 60,
        ("near", "grant.expiring:days_before=7"): 0,
        ("near", "grant.expiring:days_before=30"): 0,
    }


def test_a_closed_account_is_told_nothing() -> None:
    assert walk(ALL_OF_A_BALANCE, account(balance(0)), account(balance(0, limit=0), status="closed")) == []


def test_refusals_are_told_once_a_day_for_each_user_meter_and_reason() -> None:
    def refused(event_id: str, user: str | None = "u", *, at: datetime = NOW) -> Refused:
        entry_id, reason = f"{milliseconds_at(at)}-0", Refusal.ID_CONFLICT
        return Refused(entry_id, reason, "", b"", 0, None if user is None else (user, METER, event_id))

    writes = Writes.none()
    writes.refused.extend([refused("a"), refused("b"), refused("c", None), refused("d", "other")])
    tell_refusals(writes, NOW)
    told = {(each.user_id, each.data["event_id"]) for each in writes.notices}
    assert told == {("u", "a"), ("other", "d")}
    ids = [each.notice_id for each in writes.notices]
    assert ids == sorted(ids), "so no two batches wait for each other"
    repeated = Writes.none()
    repeated.refused.append(refused("a"))
    tell_refusals(repeated, NOW + DAY)
    assert repeated.notices[0].notice_id in ids, "the same entry, read again after midnight"
    tomorrow = Writes.none()
    tomorrow.refused.append(refused("a", at=NOW + DAY))
    tell_refusals(tomorrow, NOW + DAY)
    assert tomorrow.notices[0].notice_id not in ids


def test_operators_are_told_of_pauses_and_proofs() -> None:
    assert paused(3, "meterfall", "half of it is unreadable", NOW).data["partition"] == 3
    assert differs(7, 2, "u: 1 is not 2", NOW).data == {"differences": 2, "text": "u: 1 is not 2"}
    assert differs(7, 2, "", NOW).notice_id != differs(8, 2, "", NOW).notice_id


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the catalogue


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('{ kind = "balance.threshold" }', "percent, left: give one of them"),
        ('{ kind = "balance.threshold", percent = 80, left = 5 }', "percent, left: give one of them"),
        ('{ kind = "balance.threshold", percent = 0 }', "notices.0.percent"),
        ('{ kind = "balance.threshold", percent = 101 }', "notices.0.percent"),
        ('{ kind = "balance.threshold", percent = 80.5 }', "notices.0.percent"),
        ('{ kind = "balance.threshold", left = -1 }', "notices.0.left"),
        ('{ kind = "balance.threshold", left = 5, top_up = 0 }', "notices.0.top_up"),
        ('{ kind = "balance.depleted", percent = 80 }', "percent: only for kind = 'balance.threshold'"),
        ('{ kind = "balance.depleted", days_before = 3 }', "days_before: only for kind = 'grant.expiring'"),
        ('{ kind = "grant.expiring", days_before = 0 }', "notices.0.days_before"),
        ('{ kind = "balance.gone" }', "notices.0.kind"),
        ('{ kind = "limit.lost" }', "notices.0.kind"),
        ('{ kind = "proof.differs" }', "notices.0.kind"),
        ('{ kind = "balance.debt", meter = "tea" }', "plans.basic.notices.0.meter: unknown meter"),
        ('{ kind = "balance.debt" }, { kind = "balance.debt" }', "plans.basic.notices.1: balance.debt is there twice"),
        ('{ kind = "balance.debt", color = 1 }', "notices.0.color"),
    ],
)
def test_a_wrong_rule_is_refused_with_field_and_reason(rule: str, said: str) -> None:
    text = DEFAULT_CATALOGUE.read_text("utf-8").replace("[plans.basic]\n", f"[plans.basic]\nnotices = [{rule}]\n")
    with pytest.raises(CatalogueError) as refused:
        parse_catalogue(text, "catalogue")
    assert said in str(refused.value)


def test_a_crossing_without_its_alarm_recovers_nothing() -> None:
    assert tell([Crossing("u", METER, "balance.depleted", "p", is_reached=False, told=None)], {}) == ([], {})
