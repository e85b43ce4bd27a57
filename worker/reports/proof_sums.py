"""Proof of the sums of the reports over all accounts: those of an account are its log's, those of days its accounts'.

The sums of an account hold its changes up to the number in `report_state`, and both change in one transaction. So one
snapshot has both, whatever is summed up meanwhile. Changes after the number are no difference: reports add them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from itertools import accumulate
from typing import NamedTuple

from sqlalchemy import Engine

from worker.ledger import proof as statements
from worker.ledger.checkpoints import Span
from worker.ledger.connection import Postgres, batch_connection, begin_snapshot
from worker.ledger.proof import RunningSums, SumsByDay

# As many changes a statement adds up: it has a time-out, an account may have millions.
_CHANGES_A_STATEMENT = 100_000
_DAYS = 31
_NOTHING = ([0] * _DAYS, [0] * _DAYS)

# User ("" for all of them), month, meter and plan.
_Key = tuple[str, date, str, str]
# Events and amounts of the days of a month; in running sums, of the days up to each.
_Days = tuple[list[int], list[int]]


class WrongSum(NamedTuple):
    """A sum that differs, in words, with what it should be and what it is; `user_id` is "" for one of all accounts."""

    user_id: str
    text: str
    meter: str | None
    expected: object
    found: object


def wrong_sums(postgres: Postgres, users: Sequence[str]) -> Iterator[WrongSum]:
    """Compare the sums of these accounts with their log, in the caller's snapshot; yield the first wrong day of each.

    An account that nobody has summed up yet has no sums, and is right.
    """
    postgres.execute("SET LOCAL jit = off")  # takes longer than the statements
    made: dict[_Key, _Days] = {}
    spans = []
    for state in statements.summed_up(postgres, users):
        user_id, upto = state.user_id, min(state.seq, state.newest)
        spans.append(Span(user_id, 0, upto))
        if state.seq > state.newest:
            text = f"is summed up to seq {state.seq}, its newest is {state.newest}"
            yield WrongSum(user_id, text, None, state.newest, state.seq)
        if state.has_plan != state.plan:
            text = f"is summed up with plan {state.has_plan!r} at seq {state.seq}, it had {state.plan!r}"
            yield WrongSum(user_id, text, None, state.plan, state.has_plan)
    for portion in _portions(spans):
        _add(made, statements.sums_of_log(postgres, portion))
    stored = _running(statements.sums_of_accounts(postgres, users))
    yield from _differing(made, stored, "its log")


def wrong_sums_of_days(engine: Engine) -> Iterator[WrongSum]:
    """Compare the sums of days with those of all accounts, in a snapshot for each month.

    Yields the first wrong day of each sum, and users with sums and without an account.
    """
    with batch_connection(engine) as postgres:
        begin_snapshot(postgres)
        months = statements.summed_months(postgres)
        for user_id in statements.sums_of_nobody(postgres):
            yield WrongSum(user_id, "has sums, and no account", None, None, None)
    for month in months:
        with batch_connection(engine) as postgres:
            begin_snapshot(postgres)
            postgres.execute("SET LOCAL jit = off")
            of_accounts, of_days = statements.sums_of_month(postgres, month)
        made: dict[_Key, _Days] = {}
        _add(made, of_days)
        yield from _differing(made, _running(of_accounts), "the sums of days")


def _portions(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield the spans in portions that a statement can add up, long ones in parts."""
    portion: list[Span] = []
    room = _CHANGES_A_STATEMENT
    for user_id, after, upto in spans:
        begin = after
        while begin < upto:
            end = min(upto, begin + room)
            portion.append(Span(user_id, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield portion
                portion, room = [], _CHANGES_A_STATEMENT
    if portion:
        yield portion


def _add(made: dict[_Key, _Days], found: Iterable[SumsByDay]) -> None:
    for user_id, month, meter, plan, days, events, amounts in found:
        of_days = made.setdefault((user_id, month, meter, plan), ([0] * _DAYS, [0] * _DAYS))
        for day, count, amount in zip(days, events, amounts, strict=True):
            of_days[0][day - 1] += count
            of_days[1][day - 1] += amount


def _running(found: Iterable[RunningSums]) -> dict[_Key, _Days]:
    return {(row.user_id, row.month, row.meter, row.plan): (row.events, row.amounts) for row in found}


def _differing(made: dict[_Key, _Days], stored: dict[_Key, _Days], source: str) -> Iterator[WrongSum]:
    """Yield the sums that are not what `source` makes them: by day in `made`, up to each day in `stored`."""
    for key in sorted(made.keys() | stored.keys()):
        by_day = made.get(key, _NOTHING)
        should, has = tuple(list(accumulate(each)) for each in by_day), stored.get(key, _NOTHING)
        if should == has:
            continue
        user_id, month, meter, plan = key
        n = next((n for n in range(_DAYS) if _until(should, n) != _until(has, n)), _DAYS - 1)
        expected, found = (f"{events} events, {units} units" for events, units in (_until(should, n), _until(has, n)))
        text = (
            f"{meter} on plan {plan!r} has {found} in its sums of {month:%Y-%m} up to day {n + 1}, {source}: {expected}"
        )
        yield WrongSum(user_id, text, meter, expected, found)


def _until(sums: Sequence[Sequence[int]], n: int) -> tuple[int | None, int | None]:
    events, amounts = (each[n] if n < len(each) else None for each in sums)
    return events, amounts
