"""The proof in small steps: from where each account was proven the last time, and now and then from zero.

A step is one read-only snapshot of a bounded number of accounts and changes; a second transaction stores the
checkpoints. A run of the periodic proof keeps its position beside them. Killed anywhere, it goes on after its last
step.

- An account begins at its checkpoint. Once in thirty days it begins at zero, and the chain of digests over its rows is
  compared with that of the checkpoint: a row that was changed since is a difference.
- A checkpoint that is not as the proof wrote it is a difference. The account is proven from zero at once, and gets a
  new one if nothing else is wrong with it.
- An account with a difference keeps its checkpoint, and each proof names the difference again until it is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from time import monotonic, sleep
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import Engine

from schemas.status import Difference
from worker.crash import crash_point
from worker.keyspace import keys
from worker.ledger import checkpoints, notices
from worker.ledger.accounts import read_accounts
from worker.ledger.checkpoints import NO_END, Found, Run, Span
from worker.ledger.columns import as_json
from worker.ledger.connection import Postgres, batch_connection, begin_snapshot, open_engine, read_clock
from worker.reports.proof import (
    Replayed,
    VerifyReport,
    compare,
    compare_cached,
    compare_entries,
    compare_sums,
    replay,
    verify_rest,
)
from worker.reports.proof_result import keep_result
from worker.reports.proof_state import replayed_from, state_of
from worker.reports.wrong import Wrong
from worker.resources import Resources
from worker.rules.checkpoint import FORM, NOTHING, Checkpoint, chained, is_due
from worker.rules.notices import differs
from worker.rules.rows import EntryRow, UsageRow

Named = Callable[[str], str]
Tell = Callable[[Difference], None]
# As many differences of a run as it carries from step to step; it counts all, and tells each.
_CARRIED = 100
# Kinds of entries that are compared with rows of other tables.
_COMPARED = frozenset({"reversal", "grant", "renewal", "set_limit"})
_WAIT_SECONDS = 0.05
# What a replay raises for a row, or a state, with a content that no release writes.
_UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Step(NamedTuple):
    """What a step has proven, and where the next one goes on: after the user `after`, with the part `in_hand`.

    `whole` are new checkpoints of accounts that were proven from zero, with their states; `further` those of others.
    """

    after: str
    in_hand: Any
    is_last: bool
    from_zero: int
    from_checkpoint: int
    changes: int
    found: list[Difference]
    whole: list[tuple[Checkpoint, str]]
    further: list[tuple[Checkpoint, str]]
    doubted: list[str]


class Outcome(NamedTuple):
    """The work of one job: the run it belongs to, None without one.

    `report` is that of the whole run once it is over, with the first of its differences; `differences` counts them all.
    `is_taken`: another process proves now.
    """

    run: Run | None
    report: VerifyReport | None = None
    differences: int = 0
    is_taken: bool = False


@dataclass
class _Task:
    """An account under proof: its replay so far, and what is wrong with it."""

    account: Found
    replayed: Replayed
    is_whole: bool
    after: int = 0
    upto: int = NO_END
    digest: bytes = NOTHING
    wrongs: list[tuple[str, Wrong]] = field(default_factory=list)
    # Of a part that an earlier step replayed.
    differed: bool = False
    # An entry was among its changes that is compared with rows of other tables.
    compares: bool = False
    # The state in the checkpoint, to compare with on the way; None without a checkpoint to be believed.
    known: Any = None

    @property
    def user_id(self) -> str:
        return self.account.user_id

    @property
    def begin(self) -> int:
        """Return the number of the change after which the whole proof of the account begins."""
        return 0 if self.is_whole or self.account.checkpoint is None else self.account.checkpoint.seq

    def note(self, wrong: Wrong, where: str = "") -> None:
        """Note a difference; `where` follows the name of the user."""
        self.wrongs.append((where, wrong))

    def has_doubts(self) -> bool:
        """Return True if something else is wrong than the checkpoint and what is cached."""
        return self.differed or any(wrong.kind not in ("checkpoint", "cached balance") for _, wrong in self.wrongs)


def prove_ledger(
    resources: Resources,
    progress: Callable[[int], None] | None = None,
    *,
    named: Named = str,
    whole: bool = False,
) -> VerifyReport:
    """Prove all balances and the sponsorship pool, each account from its checkpoint; with `whole` from zero.

    Writes checkpoints, and nothing else. While another process proves a step, it waits. `progress` receives the number
    of accounts proved so far. `named` makes the name of a user for the differences.
    Raises the errors of Postgres and Redis: an unfinished proof is no proof.
    """
    settings = resources.settings
    engine = open_engine(settings, statement_timeout_ms=settings.verify_timeout_ms)
    from_zero = from_checkpoint = changes = 0
    differences: list[Difference] = []
    after, in_hand, is_last = "", None, False
    try:
        while not is_last:
            step = prove_step(resources, engine, after, in_hand, named, whole=whole)
            if step is None:
                sleep(_WAIT_SECONDS)
                continue
            # A standby proves as well, and keeps nothing.
            with suppress(psycopg.errors.ReadOnlySqlTransaction), batch_connection(engine) as postgres:
                _store(postgres, step)
                postgres.commit()
            after, in_hand, is_last = step.after, step.in_hand, step.is_last
            from_zero += step.from_zero
            from_checkpoint += step.from_checkpoint
            changes += step.changes
            differences += step.found
            if progress is not None:
                progress(from_zero + from_checkpoint)
        rest = verify_rest(resources, engine, named, whole=whole)
    finally:
        engine.dispose()
    return VerifyReport(from_zero, from_checkpoint, changes + rest.changes, rest.pending_maps, differences + rest.found)


def prove_for(resources: Resources, seconds: float, named: Named, tell: Tell, number: int | None = None) -> Outcome:
    """Go on with the run of the periodic proof for `seconds`, one step at least; begin a run if none is under way.

    With `number` it goes on with that run alone. Between two steps it rests, as the settings say. The result of a run
    that ends is kept for `status`. Killed anywhere, the next call goes on after the last step.
    Each difference goes to `tell` before its step is stored: so none is counted that nobody was told of, whatever fails
    after it. One may be told twice.
    Raises the errors of Postgres and Redis.
    """
    settings = resources.settings
    stop_at = monotonic() + seconds
    engine = open_engine(settings, statement_timeout_ms=settings.verify_timeout_ms)
    try:
        with batch_connection(engine) as postgres:
            run = checkpoints.open_run(postgres, number)
        if run is None:
            # A run that ended and was killed before it said so: the sweep must not go on with it.
            if number is not None and resources.redis.get(keys.PROVING) == str(number).encode():
                resources.redis.delete(keys.PROVING)
            return Outcome(None)
        resources.redis.set(keys.PROVING, run.number)
        while True:
            began = monotonic()
            step = prove_step(resources, engine, run.after, run.in_hand, named)
            if step is None:
                return Outcome(run, is_taken=True)
            crash_point("after_proof_step")
            stored = _advanced(run, step)
            with batch_connection(engine) as postgres:
                _store(postgres, step)
                if not checkpoints.advance(postgres, run, stored):
                    return Outcome(run, is_taken=True)  # rolled back
                for difference in step.found:
                    tell(difference)
                postgres.commit()
            run = stored
            if step.is_last:
                return _finish(resources, engine, run, named, tell)
            if monotonic() >= stop_at:
                return Outcome(run)
            load = settings.verify_load_percent
            sleep(min((monotonic() - began) * (100 - load) / load, seconds))
    finally:
        engine.dispose()


def _advanced(run: Run, step: Step) -> Run:
    """Return the run after one more step."""
    found = [*run.found, *(difference.model_dump() for difference in step.found)][:_CARRIED]
    return Run(
        number=run.number,
        step=run.step + 1,
        after=step.after,
        in_hand=step.in_hand,
        from_zero=run.from_zero + step.from_zero,
        from_checkpoint=run.from_checkpoint + step.from_checkpoint,
        changes=run.changes + step.changes,
        differences=run.differences + len(step.found),
        found=found,
    )


def _finish(resources: Resources, engine: Engine, run: Run, named: Named, tell: Tell) -> Outcome:
    """Prove the rest, and keep the result of the run. Killed before its end, the next job does the same again."""
    rest = verify_rest(resources, engine, named, whole=False)
    for difference in rest.found:
        tell(difference)
    first = [*(Difference.model_validate(each) for each in run.found), *rest.found]
    report = VerifyReport(run.from_zero, run.from_checkpoint, run.changes + rest.changes, rest.pending_maps, first)
    differences = run.differences + len(rest.found)
    keep_result(resources.redis, report, differences)
    with batch_connection(engine) as postgres:
        if differences:
            notices.store(postgres, [differs(run.number, differences, first[0].text, read_clock(postgres))])
        checkpoints.finish(postgres, run)
    resources.redis.delete(keys.PROVING)
    return Outcome(run, report, differences)


def _store(postgres: Postgres, step: Step) -> None:
    """Write the checkpoints of a step, in the caller's transaction."""
    checkpoints.lock_writes(postgres)
    checkpoints.write(postgres, step.whole, (), whole=True)
    checkpoints.write(postgres, step.further, step.doubted, whole=False)


# ---------------------------------------------------------------------------------------------------------------------
# One step


def prove_step(
    resources: Resources, engine: Engine, after: str, in_hand: Any, named: Named, *, whole: bool = False
) -> Step | None:
    """Prove the next accounts after the user `after`, in one snapshot; None if another process proves now.

    At most `verify_chunk_accounts` accounts and `verify_chunk_changes` changes. An account with more of them is proven
    in parts: `in_hand` is what the step before returned of it. Reads only. Raises the errors of Postgres and Redis.
    """
    settings = resources.settings
    with batch_connection(engine) as postgres:
        begin_snapshot(postgres)
        if not checkpoints.try_turn(postgres):
            return None
        room = settings.verify_chunk_changes
        page = checkpoints.next_accounts(postgres, after, settings.verify_chunk_accounts, room, whole=whole)
        if not page:
            return Step(after, None, True, 0, 0, 0, [], [], [], [])
        today = checkpoints.today(postgres)
        untouched, tasks = _planned(postgres, page, in_hand, today, whole, room)
        changes = _replay(postgres, tasks)
        begins = {task.user_id: task.begin for task in tasks if task.compares and task.upto == NO_END}
        of_entries = list(compare_entries(postgres, begins, named)) if begins else []
        part = tasks.pop() if tasks and tasks[-1].upto != NO_END else None
        cached = _cached(resources, [account.user_id for account in untouched])
        loaded = read_accounts(postgres, [*(task.user_id for task in tasks), *cached])
        by_user = {task.user_id: task for task in tasks}
        for user_id, wrong in of_entries:
            by_user[user_id].note(wrong)
        for task in tasks:
            stored = loaded.accounts[task.user_id]
            for wrong in compare(stored, loaded.counters[task.user_id], task.replayed):
                task.note(wrong)
        if from_zero := [task.user_id for task in tasks if task.is_whole]:
            for user_id, wrong in compare_sums(postgres, from_zero):
                by_user[user_id].note(wrong)
        of_cache = compare_cached(resources, postgres, loaded)
    found = [difference for task in (*tasks, *([part] if part else [])) for difference in _named(task, named)]
    found += [wrong.of(named(user_id), named(user_id)) for user_id, wrong in of_cache]
    # The accounts that this step is done with, in their order.
    done = sorted([*by_user, *(account.user_id for account in untouched)])
    proven = [task for task in tasks if not task.has_doubts()]
    return Step(
        after=done[-1] if done else after,
        in_hand=_part_of(part) if part is not None else None,
        is_last=False,
        from_zero=sum(task.is_whole for task in tasks),
        from_checkpoint=len(done) - sum(task.is_whole for task in tasks),
        changes=changes,
        found=found,
        whole=[_checkpoint_of(task, today) for task in proven if task.is_whole],
        further=[_checkpoint_of(task, today) for task in proven if not task.is_whole],
        doubted=[task.user_id for task in tasks if task.has_doubts()],
    )


def _planned(
    postgres: Postgres, page: Sequence[Found], in_hand: Any, today: date, whole: bool, room: int
) -> tuple[list[Found], list[_Task]]:
    """Return the accounts of a page that are as their checkpoints say, and tasks for the others, in their order.

    With no `room` left for more changes it stops; the last task may be a part of its account.
    """
    in_hand = in_hand if in_hand is not None and in_hand["user_id"] == page[0].user_id else None
    first = page[0].user_id if in_hand is not None else None
    touched = [each for each in page if each.user_id == first or whole or _is_touched(each, today)]
    states = checkpoints.read_states(postgres, [each.user_id for each in touched if each.checkpoint is not None])
    work = {each.user_id for each in touched}
    untouched: list[Found] = []
    tasks: list[_Task] = []
    for account in page:
        if account.user_id not in work:
            untouched.append(account)
            continue
        if room <= 0:
            break
        state = states.get(account.user_id)
        task = _task(account, state, today, whole)
        if in_hand is not None:
            task, in_hand = _continued(task, in_hand), None
        tasks.append(task)
        more = account.seq - task.after
        if more > room:
            task.upto = task.after + room
            break
        room -= max(more, 1)
    return untouched, tasks


def _is_touched(account: Found, today: date) -> bool:
    """Return True unless the account is as its checkpoint says, and is not due to be proven from zero."""
    known = account.checkpoint
    return (
        known is None
        or (known.seq, known.form, known.stands) != (account.seq, FORM, account.stands)
        or known.doubted
        or not known.is_sealed
        or is_due(account.user_id, known.whole_on, today)
    )


def _task(account: Found, state: Any, today: date, whole: bool) -> _Task:
    """Return the task to prove an account: from its checkpoint if that may be believed, else from zero."""
    user_id, known = account.user_id, account.checkpoint
    from_zero = _Task(account, Replayed.nothing(user_id), is_whole=True)
    if known is None or known.form != FORM:
        return from_zero
    if not known.is_sealed:
        from_zero.note(Wrong(f"its checkpoint at seq {known.seq} is not as the proof wrote it", "checkpoint"))
        return from_zero
    from_zero.known = state
    if known.seq > account.seq:
        text = f"{known.seq} changes were proven, {account.seq} are left"
        from_zero.note(Wrong(text, "history", None, known.seq, account.seq))
    elif not (whole or known.doubted or is_due(user_id, known.whole_on, today)):
        try:
            replayed = replayed_from(user_id, state)
        except _UNREADABLE:
            from_zero.note(Wrong(f"its checkpoint at seq {known.seq} cannot be read", "checkpoint"))
        else:
            return _Task(account, replayed, is_whole=False, after=known.seq, digest=known.digest)
    return from_zero


def _replay(postgres: Postgres, tasks: Sequence[_Task]) -> int:
    """Replay the changes of tasks; return their number."""
    by_user = {task.user_id: task for task in tasks}
    changes = 0
    spans = [Span(task.user_id, task.after, task.upto) for task in tasks]
    for user_id, rows in checkpoints.read_spans(postgres, spans):
        task = by_user[user_id]
        changes += len(rows)
        task.compares |= any(isinstance(row, EntryRow) and row.kind in _COMPARED for row, _ in rows)
        _replay_rows(task, rows)
        if task.upto != NO_END:
            task.after = task.upto
    return changes


def _replay_rows(task: _Task, rows: Iterable[tuple[EntryRow | UsageRow, str]]) -> None:
    known = task.account.checkpoint
    for row, text in rows:
        task.digest = chained(task.digest, text)
        try:
            for wrong in replay(task.replayed, row):
                task.note(wrong, f" seq {row.seq}")
        except _UNREADABLE as error:
            task.note(Wrong(f"cannot be replayed: {type(error).__name__}", "unreadable"), f" seq {row.seq}")
            return
        if task.known is not None and known is not None and row.seq == known.seq:
            _compare_with_checkpoint(task, known)


def _compare_with_checkpoint(task: _Task, known: Checkpoint) -> None:
    """Compare a replay from zero with the checkpoint that it has come to."""
    if task.digest != known.digest:
        text = f"rows up to seq {known.seq} are not those that were proven before"
        task.note(Wrong(text, "history", None, known.digest.hex(), task.digest.hex()))
    elif _plain(state_of(task.replayed)) != task.known:
        task.note(Wrong(f"its checkpoint at seq {known.seq} is not what its rows make of it", "checkpoint"))


def _cached(resources: Resources, users: Sequence[str]) -> list[str]:
    """Return those of these users that have a cached balance."""
    partitions = resources.settings.partitions
    with resources.redis.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.exists(keys.account_of(user_id, partitions).balance)
        return [user_id for user_id, exists in zip(users, pipe.execute(), strict=True) if exists]


def _checkpoint_of(task: _Task, today: date) -> tuple[Checkpoint, str]:
    """Return the new checkpoint of an account, and its state as JSON."""
    account = task.account
    whole_on = today if task.is_whole or account.checkpoint is None else account.checkpoint.whole_on
    checkpoint = Checkpoint(account.user_id, account.seq, task.digest, FORM, account.stands, whole_on)
    return checkpoint, as_json(state_of(task.replayed)) or ""


def _named(task: _Task, named: Named) -> Iterator[Difference]:
    """Yield the differences of a task."""
    for where, wrong in task.wrongs:
        name = named(task.user_id)
        yield wrong.of(name, f"{name}{where}")


def _plain(state: Mapping[str, Any]) -> Any:
    """Return a state as it comes back from JSON."""
    return json.loads(as_json(state) or "null")


# ---------------------------------------------------------------------------------------------------------------------
# A part of an account


def _part_of(task: _Task) -> dict[str, Any]:
    """Return a task that is not at its end as JSON can hold it."""
    return {
        "user_id": task.user_id,
        "after": task.after,
        "digest": task.digest.hex(),
        "is_whole": task.is_whole,
        "differed": task.has_doubts(),
        "compares": task.compares,
        "state": _plain(state_of(task.replayed)),
    }


def _continued(task: _Task, part: Mapping[str, Any]) -> _Task:
    """Return the task of an account that goes on after a part."""
    return _Task(
        task.account,
        replayed_from(task.user_id, part["state"]),
        is_whole=part["is_whole"],
        after=part["after"],
        digest=bytes.fromhex(part["digest"]),
        differed=part["differed"],
        compares=part["compares"],
        known=task.known if part["is_whole"] else None,
    )
