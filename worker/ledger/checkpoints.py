"""Statements about the checkpoints of the proof, and about the run of a proof that is under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from pydantic_core import from_json

from worker.ledger.accounts import ENTRY_COLUMNS
from worker.ledger.columns import array, arrays, as_json, text_array
from worker.ledger.connection import LOCK_SPACE, PROOF_LOCK, PROOF_WRITES_LOCK, Postgres
from worker.rules.checkpoint import Checkpoint
from worker.rules.rows import EntryRow, UsageRow

# Greater than the number of any change.
NO_END = 2**62

# Text of a row for the chain of digests: its columns when the form of the chain was made, without the user. A new
# column joins with a new form, or as wallet and price: rows without them keep their text.
_USAGE_TEXT = """ROW(seq, event_id, meter, quantity, multiplier, amount, from_subscription, from_rollover,
    from_purchased, overflow_to_debt, uncollected, period_start, occurred_at, applied_at, clamped, source, reference_id,
    hold_key, dimensions, remainder, trace_id, grants)::text || coalesce(' ' || wallet || ' ' || price, '')"""
_ENTRY_TEXT = """ROW(seq, entry_key, meter, kind, used_change, rollover_change, purchased_change, used_after,
    rollover_after, purchased_after, detail, created_at, actor, reason)::text"""
# Of the texts and times of an event the replay needs none; the chain has them. Of its dimensions, it needs the backend,
# which comes as text: decoding JSON would be a fifth of the work.
_REPLAYED = {
    "multiplier": "multiplier::text",
    "price": "price::text",
    "occurred_at": "NULL",
    "applied_at": "NULL",
    "source": "NULL",
    "reference_id": "NULL",
    "hold_key": "NULL",
    "dimensions": "CASE jsonb_typeof(dimensions->'backend') WHEN 'string' THEN dimensions->>'backend' END",
    "trace_id": "NULL",
}
_USAGE = ", ".join(f"{_REPLAYED.get(name, name)} AS {name}" for name in UsageRow._fields)
_BACKEND = UsageRow._fields.index("dimensions")
_READ_SPANS = """
    SELECT found.* FROM unnest(%s::text[], %s::bigint[], %s::bigint[]) AS span (user_id, after, upto)
    CROSS JOIN LATERAL (
        SELECT {columns}, {text} AS row_text FROM {table} AS change
        WHERE change.user_id = span.user_id AND seq > span.after AND seq <= span.upto ORDER BY seq
    ) AS found
"""
_USAGE_SPANS = _READ_SPANS.format(columns=_USAGE, text=_USAGE_TEXT, table="usage_log")
_ENTRY_SPANS = _READ_SPANS.format(columns=ENTRY_COLUMNS, text=_ENTRY_TEXT, table="ledger_entry")

# The texts of rows are the same in every session.
_PLAIN_TEXTS = "SELECT set_config('datestyle', 'ISO, YMD', true), set_config('timezone', 'UTC', true)"

# What a checkpoint says, sealed.
_SEAL = """sha256(convert_to(concat_ws(' ', {0}.user_id, {0}.seq, encode({0}.digest, 'hex'), {0}.form, {0}.stands,
    {0}.whole_on - date '2000-01-01', {0}.state::text), 'UTF8'))"""
_NEXT = f"""
    SELECT account.user_id, account.seq, stands.hash, checkpoint.seq, checkpoint.digest, checkpoint.form,
        checkpoint.stands, checkpoint.whole_on, checkpoint.seal = {_SEAL.format("checkpoint")}, checkpoint.doubted
    FROM (
        SELECT user_id, seq, sum(greatest(seq - known, 0)) OVER (ORDER BY user_id) - greatest(seq - known, 0) AS before
        FROM (
            SELECT user_id, account.seq, CASE WHEN %(whole)s THEN 0 ELSE coalesce(checkpoint.seq, 0) END AS known
            FROM account LEFT JOIN proof_checkpoint AS checkpoint USING (user_id)
            WHERE user_id > %(after)s ORDER BY user_id LIMIT %(accounts)s
        ) AS page
    ) AS page JOIN account ON account.user_id = page.user_id
    CROSS JOIN LATERAL (
        SELECT hashtextextended(account::text || coalesce(string_agg(balance::text, ' ' ORDER BY meter), ''), 0) AS hash
        FROM balance WHERE balance.user_id = account.user_id
    ) AS stands
    LEFT JOIN proof_checkpoint AS checkpoint ON checkpoint.user_id = account.user_id
    WHERE page.before < %(changes)s ORDER BY account.user_id
"""
# An account that was closed since it was read gets no checkpoint, not even if it has begun anew.
_WRITE = f"""
    INSERT INTO proof_checkpoint (user_id, seq, digest, form, stands, whole_on, state, seal, proven_at)
    SELECT new.*, {_SEAL.format("new")}, ledger_now()
    FROM unnest(%s::text[], %s::bigint[], %s::bytea[], %s::integer[], %s::bigint[], %s::date[], %s::json[])
        AS new (user_id, seq, digest, form, stands, whole_on, state)
    WHERE EXISTS (SELECT FROM account WHERE account.user_id = new.user_id AND account.seq >= new.seq)
    ON CONFLICT (user_id) DO UPDATE SET seq = excluded.seq, digest = excluded.digest, form = excluded.form,
        stands = excluded.stands, whole_on = excluded.whole_on, state = excluded.state, seal = excluded.seal,
        doubted = false, proven_at = excluded.proven_at
"""


class Found(NamedTuple):
    """An account as the proof meets it: the number of its last change, a hash of what is stored, its checkpoint."""

    user_id: str
    seq: int
    stands: int
    checkpoint: Checkpoint | None


class Span(NamedTuple):
    """Changes of an account: those after the change `after`, up to the change `upto`."""

    user_id: str
    after: int
    upto: int


class Run(NamedTuple):
    """A run of the periodic proof: it has proven the accounts up to `after`, and a part of the next one, `in_hand`.

    Each step of it has a number. `found` are its first differences as JSON has them, `differences` counts them all.
    """

    number: int
    step: int
    after: str
    in_hand: Any
    from_zero: int
    from_checkpoint: int
    changes: int
    differences: int
    found: list[dict[str, Any]]


_RUN = ", ".join(Run._fields)


def try_turn(postgres: Postgres) -> bool:
    """Take the turn to prove until this transaction ends; False if another proof has it."""
    row = postgres.execute("SELECT pg_try_advisory_xact_lock(%s, %s)", (LOCK_SPACE, PROOF_LOCK)).fetchone()
    return bool(row and row[0])


def next_accounts(postgres: Postgres, after: str, accounts: int, changes: int, *, whole: bool) -> list[Found]:
    """Return the next accounts after `after`, in the order of their ids, with their checkpoints.

    At most so many `accounts`, and about as many as have so many `changes` after their checkpoints; with `whole`, in
    all.
    """
    postgres.execute(_PLAIN_TEXTS)
    found = []
    bounds = {"after": after, "accounts": accounts, "changes": changes, "whole": whole}
    for user_id, seq, stands, *checkpoint in postgres.execute(_NEXT, bounds).fetchall():
        known = Checkpoint(user_id, *checkpoint) if checkpoint[0] is not None else None
        found.append(Found(user_id, seq, stands, known))
    return found


def read_states(postgres: Postgres, users: Sequence[str]) -> dict[str, Any]:
    """Return the states in the checkpoints of these users, by user."""
    rows = postgres.execute(
        "SELECT user_id, state::text FROM proof_checkpoint WHERE user_id = ANY(%s::text[])", (text_array(users),)
    )
    return {user_id: from_json(state) for user_id, state in rows.fetchall()}


def read_spans(postgres: Postgres, spans: Sequence[Span]) -> Iterator[tuple[str, list[tuple[Any, str]]]]:
    """Yield each user with the changes of its span in order: the row, and its text for the chain."""
    columns = arrays(spans, "tii")
    changes: dict[str, list[tuple[Any, str]]] = {span.user_id: [] for span in spans}
    for statement, row_of in ((_ENTRY_SPANS, EntryRow._make), (_USAGE_SPANS, _usage_row)):
        for user_id, rows in groupby(postgres.execute(statement, columns, binary=True).fetchall(), itemgetter(0)):
            changes[user_id] += [(row_of(row[:-1]), row[-1]) for row in rows]
    for user_id, found in changes.items():
        found.sort(key=lambda change: change[0].seq)
        yield user_id, found


def _usage_row(row: Sequence[Any]) -> UsageRow:
    if row[_BACKEND] is None:
        return UsageRow._make(row)
    values = list(row)
    values[_BACKEND] = {"backend": values[_BACKEND]}
    return UsageRow._make(values)


def write(postgres: Postgres, proven: Sequence[tuple[Checkpoint, str]], doubted: Sequence[str], *, whole: bool) -> None:
    """Write checkpoints with their states as JSON; note those of `doubted` users as such.

    Only a proof from zero, `whole`, ends a doubt. Call `lock_writes` before.
    """
    if proven:
        rows = [(each.user_id, each.seq, each.digest.hex(), each.form, each.stands, each.whole_on.isoformat(), state)
                for each, state in proven]  # fmt: skip
        users, seqs, digests, forms, stands, days, states = zip(*rows, strict=True)
        statement = _WRITE if whole else f"{_WRITE} WHERE NOT proof_checkpoint.doubted"
        columns = (text_array(users), array(seqs), array([rf"\x{digest}" for digest in digests]), array(forms),
                   array(stands), array(days), array(states))  # fmt: skip
        postgres.execute(statement, columns)
    if doubted:
        postgres.execute(
            "UPDATE proof_checkpoint SET doubted = true WHERE user_id = ANY(%s::text[])", (text_array(doubted),)
        )


def lock_writes(postgres: Postgres) -> None:
    """Let no other transaction write or erase checkpoints until this one ends."""
    postgres.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_SPACE, PROOF_WRITES_LOCK))


def erase(postgres: Postgres, user_id: str) -> None:
    """Delete the checkpoint of an account that is being closed: its rows are about to change. Call it late.

    A proof that read the account before writes no checkpoint after: it waits for the caller's COMMIT, and finds the
    account gone. A step under way is not stored: it may have read the account. The run goes on from the account before.
    """
    lock_writes(postgres)
    postgres.execute("DELETE FROM proof_checkpoint WHERE user_id = %s", (user_id,))
    postgres.execute(
        "UPDATE proof_run SET step = step + 1, "
        "in_hand = CASE WHEN in_hand->>'user_id' = %(user)s THEN NULL ELSE in_hand END, after = "
        "CASE after WHEN %(user)s THEN coalesce((SELECT max(user_id) FROM account WHERE user_id < %(user)s), '') "
        "ELSE after END",
        {"user": user_id},
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run of the periodic proof


def open_run(postgres: Postgres, number: int | None) -> Run | None:
    """Return the run under way, or a new one; with `number` only that one, and None if it has ended.

    Commits a new run.
    """
    row = postgres.execute(f"SELECT {_RUN} FROM proof_run WHERE finished_at IS NULL").fetchone()
    if row is None and number is None:
        row = postgres.execute(
            "INSERT INTO proof_run (number) VALUES (1) ON CONFLICT (only_row) DO UPDATE SET "
            "number = proof_run.number + 1, step = 0, started_at = ledger_now(), finished_at = NULL, after = '', "
            "in_hand = NULL, from_zero = 0, from_checkpoint = 0, changes = 0, differences = 0, found = '[]' "
            f"WHERE proof_run.finished_at IS NOT NULL RETURNING {_RUN}"
        ).fetchone()
    postgres.commit()
    return Run(*row) if row is not None and number in (None, row[0]) else None


def advance(postgres: Postgres, before: Run, after: Run) -> bool:
    """Store the next step of a run; False if another process was faster."""
    changed = {name: value for name, value in after._asdict().items() if name not in ("number", "step")}
    changed |= {"in_hand": as_json(after.in_hand), "found": as_json(after.found)}
    updates = ", ".join(f"{name} = %({name})s" for name in changed)
    done = postgres.execute(
        f"UPDATE proof_run SET step = step + 1, {updates} "
        "WHERE number = %(number)s AND step = %(step)s AND finished_at IS NULL",
        {**changed, "number": before.number, "step": before.step},
    )
    return done.rowcount == 1


def finish(postgres: Postgres, run: Run) -> None:
    """Note that a run has ended, and commit. Its differences are kept elsewhere. Repeating is harmless."""
    postgres.execute(
        "UPDATE proof_run SET finished_at = ledger_now(), after = '', in_hand = NULL, found = '[]' WHERE number = %s",
        (run.number,),
    )
    postgres.commit()


def today(postgres: Postgres) -> date:
    """Return the day of the ledger's clock, in UTC."""
    row = postgres.execute("SELECT (ledger_now() AT TIME ZONE 'UTC')::date").fetchone()
    assert row is not None
    found: date = row[0]
    return found
