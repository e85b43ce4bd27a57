"""The day on which an account is proven from zero, and the chain over its rows."""

from __future__ import annotations

from datetime import date, timedelta

from worker.rules.checkpoint import DAYS, NOTHING, chained, is_due

FIRST = date(2026, 11, 1)
USERS = [f"user-{number}" for number in range(3_000)]


def test_in_thirty_days_each_account_has_its_turn_once_and_a_day_has_a_thirtieth_of_them() -> None:
    whole_on = dict.fromkeys(USERS, FIRST)
    turns = dict.fromkeys(USERS, 0)
    for number in range(1, DAYS + 1):
        today = FIRST + timedelta(days=number)
        due = [user for user in USERS if is_due(user, whole_on[user], today)]
        assert 60 < len(due) < 140
        for user in due:
            turns[user] += 1
            whole_on[user] = today
        assert not any(is_due(user, whole_on[user], today) for user in USERS), "once a day, however many runs it has"
    assert set(turns.values()) == {1}


def test_a_day_that_no_proof_saw_is_made_up_for() -> None:
    today = FIRST + timedelta(days=DAYS)
    assert all(is_due(user, FIRST - timedelta(days=1), today) for user in USERS)


def test_a_day_to_come_is_not_believed() -> None:
    assert is_due("user-1", FIRST + timedelta(days=1), FIRST)


def test_the_chain_tells_rows_their_order_and_their_bounds() -> None:
    def of(*rows: str) -> bytes:
        digest = NOTHING
        for row in rows:
            digest = chained(digest, row)
        return digest

    assert len({of(), of("(1,a)"), of("(1,b)"), of("(1,a)", "(2,b)"), of("(2,b)", "(1,a)"), of("(1,a)(2,b)")}) == 6
