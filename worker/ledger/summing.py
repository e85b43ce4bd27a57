"""Usage of all accounts, summed up per day and per account and month, for the reports over all accounts.

A sum holds the changes of an account up to the number in `report_state`. A change takes its number under the account's
lock, and `account.seq` is the newest in the same snapshot. So a report that adds the changes after the sum (the tail)
is exact, even if no sum was ever made. A reversal is a change also: the reversed event with the opposite sign, on the
day of the event. Events without an account have no number; reports read them from an index of their own.

The sums have no source but the log. They cost a drain nothing: a job makes them from what is there.
"""

from __future__ import annotations

from typing import NamedTuple

from worker.ledger.connection import LOCK_SPACE, SUMS_LOCK, Postgres
from worker.ledger.reports import reported_meter

_ACCOUNTS_A_CHUNK = 500
# Most of them have nothing new: a statement looks at so many.
_ACCOUNTS_A_LOOK = 10_000
# The plan of an account is named by entries of the whole account.
NAMES_A_PLAN = "meter = '' AND detail ? 'plan'"

# Accounts with changes that are not summed up, for reports: all of them.
TAIL = """
    due AS MATERIALIZED (
        SELECT account.user_id, coalesce(state.seq, 0) AS low, account.seq AS high, coalesce(state.plan, '') AS plan
        FROM account LEFT JOIN report_state AS state USING (user_id)
        WHERE account.seq > coalesce(state.seq, 0)
    )
"""
# … and for the job: the next accounts by id, until the changes of a transaction are together.
_CHUNK = f"""
    page AS (
        SELECT user_id, seq FROM account WHERE user_id >= %(from)s ORDER BY user_id LIMIT {_ACCOUNTS_A_LOOK}
    ),
    found AS (
        SELECT page.user_id, coalesce(state.seq, 0) AS low, coalesce(state.plan, '') AS plan,
            least(page.seq, coalesce(state.seq, 0) + %(changes)s) AS high, page.seq AS newest
        FROM page LEFT JOIN report_state AS state USING (user_id)
        WHERE page.seq > coalesce(state.seq, 0)
        ORDER BY page.user_id LIMIT {_ACCOUNTS_A_CHUNK}
    ),
    counted AS (SELECT *, sum(high - low) OVER (ORDER BY user_id) - (high - low) AS before FROM found),
    due AS MATERIALIZED (SELECT user_id, low, high, plan, newest FROM counted WHERE before < %(changes)s)
"""
# The changes of the accounts in `due`, each with its day and the plan that the account had. A plan counts from an entry
# that names it until the next one: an era, which is one look into the index of the log (OFFSET 0). A plain join may
# read the whole log.
CHANGES = f"""
    entry AS MATERIALIZED (
        SELECT user_id, seq, kind, entry_key, new_plan, high FROM due CROSS JOIN LATERAL (
            SELECT seq, kind, entry_key, CASE WHEN {NAMES_A_PLAN} THEN detail ->> 'plan' END AS new_plan
            FROM ledger_entry WHERE ledger_entry.user_id = due.user_id AND seq > due.low AND seq <= due.high OFFSET 0
        ) AS entry
        WHERE new_plan IS NOT NULL OR kind = 'reversal'
    ),
    era AS MATERIALIZED (
        SELECT user_id, plan COLLATE "C" AS plan, seq AS after, lead(seq, 1, high) OVER seqs AS until,
            lead(seq) OVER seqs IS NULL AS is_last
        FROM (
            SELECT user_id, low AS seq, plan, high FROM due
            UNION ALL
            SELECT user_id, seq, new_plan, high FROM entry WHERE new_plan IS NOT NULL
        ) AS named WINDOW seqs AS (PARTITION BY user_id ORDER BY seq)
    ),
    change AS MATERIALIZED (
        SELECT user_id, 1 AS sign, meter, plan, amount, (occurred_at AT TIME ZONE 'UTC')::date AS day FROM era
        CROSS JOIN LATERAL (
            SELECT {reported_meter("usage_log")} AS meter, amount, occurred_at FROM usage_log
            WHERE usage_log.user_id = era.user_id AND seq > era.after AND seq <= era.until OFFSET 0
        ) AS event
        UNION ALL
        SELECT user_id, -1, meter, plan_then COLLATE "C", amount, (occurred_at AT TIME ZONE 'UTC')::date FROM entry
        CROSS JOIN LATERAL (
            SELECT {reported_meter("event")} AS meter, event.amount, event.occurred_at, coalesce((
                SELECT detail ->> 'plan' FROM ledger_entry AS former
                WHERE former.user_id = entry.user_id AND former.seq < event.seq AND {NAMES_A_PLAN}
                ORDER BY former.seq DESC LIMIT 1
            ), '') AS plan_then
            FROM usage_log AS event
            WHERE event.user_id = entry.user_id AND event.event_id = substr(entry.entry_key, 9) OFFSET 0
        ) AS reversed
        WHERE kind = 'reversal'
    )
"""
# A change of nothing on the first of a month: its sums begin there.
_FIRST_OF_MONTH = "user_id, 0, meter, plan, 0::bigint, date_trunc('month', day::timestamp)::date"
_SUM_UP = f"""
    WITH {_CHUNK}, {CHANGES},
    by_day AS (
        INSERT INTO usage_daily AS old (day, meter, plan, events, amount)
        SELECT day, meter, plan, sum(sign), sum(sign * amount) FROM change GROUP BY day, meter, plan
        ON CONFLICT (day, meter, plan) DO UPDATE
        SET events = old.events + excluded.events, amount = old.amount + excluded.amount
    ),
    by_day_of_month AS (
        SELECT user_id, date_trunc('month', day::timestamp)::date AS month, meter, plan,
            extract(day FROM day)::int AS first, sum(sign) AS events, sum(sign * amount) AS amount
        FROM (SELECT * FROM change UNION ALL SELECT DISTINCT {_FIRST_OF_MONTH} FROM change) AS with_first
        GROUP BY user_id, day, meter, plan
    ),
    until AS (
        SELECT user_id, month, meter, plan, first, lead(first, 1, 32) OVER days - 1 AS last,
            (sum(events) OVER days)::bigint AS events, (sum(amount) OVER days)::bigint AS amount
        FROM by_day_of_month WINDOW days AS (PARTITION BY user_id, month, meter, plan ORDER BY first)
    ),
    by_account AS (
        INSERT INTO usage_monthly AS old (user_id, month, meter, plan, events, amounts)
        SELECT user_id, month, meter, plan, array_agg(events ORDER BY n), array_agg(amount ORDER BY n)
        FROM until CROSS JOIN generate_series(first, last) AS n GROUP BY user_id, month, meter, plan
        ON CONFLICT (user_id, month, meter, plan) DO UPDATE
        SET events = (
                SELECT array_agg(a + b ORDER BY n)
                FROM unnest(old.events, excluded.events) WITH ORDINALITY AS pair (a, b, n)
            ),
            amounts = (
                SELECT array_agg(a + b ORDER BY n)
                FROM unnest(old.amounts, excluded.amounts) WITH ORDINALITY AS pair (a, b, n)
            )
    ),
    by_state AS (
        INSERT INTO report_state AS old (user_id, seq, plan)
        SELECT user_id, until, plan FROM era WHERE is_last
        ON CONFLICT (user_id) DO UPDATE SET seq = excluded.seq, plan = excluded.plan
    )
    SELECT coalesce(sum(high - low), 0)::bigint, max(user_id), coalesce(bool_or(high < newest), false), count(*),
        (SELECT count(*) FROM found), (SELECT count(*) FROM page), (SELECT max(user_id) FROM page)
    FROM due
"""


class Summed(NamedTuple):
    """The changes that a call summed up, and the id at which the next call goes on; None: it reached the last one."""

    changes: int
    go_on_at: str | None


def sum_up(postgres: Postgres, go_on_at: str, changes: int) -> Summed:
    """Sum up the next at most `changes` changes of accounts from the id `go_on_at` on, and commit.

    Locks no account. If another process sums up, or an account is being erased, it does nothing. Killed at any point,
    all of it happened or nothing.
    """
    ((is_ours,),) = postgres.execute("SELECT pg_try_advisory_xact_lock(%s, %s)", (LOCK_SPACE, SUMS_LOCK)).fetchall()
    if not is_ours:
        postgres.rollback()
        return Summed(0, None)
    # A statement of its own: its snapshot is from after the lock. JIT takes longer than the statement.
    postgres.execute("SET LOCAL jit = off")
    statement = postgres.execute(_SUM_UP, {"from": go_on_at, "changes": changes})
    ((done, last, is_cut, taken, found, looked_at, end),) = statement.fetchall()
    postgres.commit()
    if is_cut:
        return Summed(int(done), last)
    if found == taken and found < _ACCOUNTS_A_CHUNK:  # all that this look has found
        last = end if looked_at == _ACCOUNTS_A_LOOK else None
    # No id has a space, which sorts before all characters of ids: the next id after `last`.
    return Summed(int(done), None if last is None else f"{last} ")


def rename_sums(postgres: Postgres, user_id: str, pseudonym: str) -> None:
    """Move a closed account's sums to its pseudonym, in the caller's transaction. The sums of days name nobody.

    Waits for a summing up that is at work; a later one waits for the caller's COMMIT, and finds the account renamed.
    """
    postgres.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_SPACE, SUMS_LOCK))
    for table in ("report_state", "usage_monthly"):
        postgres.execute(f"UPDATE {table} SET user_id = %s WHERE user_id = %s", (pseudonym, user_id))
