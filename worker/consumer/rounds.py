"""A round: the small backlogs of many partitions, applied in one transaction.

While events come slowly, most of the cost and of the wait of a batch is its round trips, and partitions wait for each
other's. A round makes these trips once for all. It has the steps of `apply_batch` (worker/consumer/batch.py), and takes
the plain case only: a partition with more than a read, with an entry that is no event, or with a mark that its drain
left, is passed by. So is every partition of a round that fails: its drain finds the cause.

What holds if the process dies in a round is what holds for a batch: each partition has a mark, and its drain finds what
was recorded. The locks of the partitions are tried, never waited for; those of the accounts are taken in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from secrets import token_hex
from time import monotonic
from typing import NamedTuple

import psycopg
import redis
from loguru import logger
from rq.timeouts import BaseTimeoutException

from config.log import described
from worker.consumer.drain import waiting_ttl_ms
from worker.consumer.refusals import RefusalLog
from worker.consumer.tally import Tally
from worker.consumer.usage import UsageBooks
from worker.crash import crash_point
from worker.keyspace import calls, keys, scripts
from worker.keyspace.entries import RawEntry
from worker.keyspace.keys import Partition, Stream
from worker.keyspace.reader import read_small
from worker.ledger import batch
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.partitions import Turn, try_lock_partitions
from worker.reports import counts
from worker.resources import Resources
from worker.rules.batch import Outcome, identities_of, users_of
from worker.rules.entry_times import is_ahead, stream_time
from worker.rules.received import Received, Refused
from worker.rules.rows import Loaded, Writes, together
from worker.tracing import Processing


class _Share(NamedTuple):
    """The part of one partition in a round. `taken_ms` is on the clock of Redis, before its entries were read."""

    partition: Partition
    books: UsageBooks
    items: list[Received]
    taken_ms: int


class Together(NamedTuple):
    """What a round did: the partitions that it disposed of, and those of them and others with entries left."""

    done: frozenset[Partition]
    left: frozenset[Partition]


def dispose_together(resources: Resources, turn: Stream, refusals: RefusalLog, tally: Tally) -> Together:
    """Dispose of the backlogs of all partitions that rang and have a small one, beginning with `turn`.

    Of none if fewer than two have, or if the round failed: then each partition must be drained by itself, which finds
    what is applied already. So no error of one partition stops the others.
    `refusals` and `tally` log and count as for a drain. Raises if Redis does not answer, or the job's time is up. Safe
    to repeat, and to run beside drains.
    """
    marked: list[Partition] = []
    waiting: dict[Partition, int] = {}
    token = token_hex(8)
    done = frozenset[Partition]()
    try:
        done = _dispose(resources, turn, token, marked, waiting, refusals, tally)
    except (redis.ConnectionError, redis.TimeoutError, BaseTimeoutException):
        raise
    except Exception as error:  # noqa: BLE001 - the drain of the partition that is at fault meets it, and says so
        if marked:
            said = described(error)
            tally.count(counts.FAILURES, {type(error).__name__: 1})
            logger.bind(cause=f"round failed: {said}").warning(
                "{} partitions together failed, each is drained by itself: {}", len(marked), said
            )
    finally:
        left = _take_back(resources, marked, token, waiting)
    return Together(done, left)


def _dispose(
    resources: Resources,
    turn: Stream,
    token: str,
    marked: list[Partition],
    waiting: dict[Partition, int],
    refusals: RefusalLog,
    tally: Tally,
) -> frozenset[Partition]:
    """Do the steps of a round. Tells in `marked` and `waiting` what has to be taken back, whatever happens."""
    began = monotonic()
    rung = _with_small_backlog(resources, turn)
    if len(rung) < 2:
        return frozenset()
    with batch_connection(resources.engine) as postgres:
        turns = _turns(resources, postgres, rung)
        if len(turns) < 2:
            return frozenset()
        marked.extend(turns)
        shares = _take(resources, turns, token, refusals)
        if not shares:
            return frozenset()
        crash_point("after_read")
        items = [item for share in shares for item in share.items]
        asked = monotonic()
        # An account in use must not hold up the others: its partition's drain knows what to do.
        loaded = batch.load_for_update(postgres, users_of(items), identities_of(items), skip_locked=True)
        lock_seconds = monotonic() - asked
        shares = [share for share in shares if loaded.in_use.isdisjoint(users_of(share.items))]
        if not shares:
            return frozenset()
        with _spans(shares):
            outcomes = _apply(postgres, shares, loaded)
    for share, outcome in zip(shares, outcomes, strict=True):
        share.books.count(tally, share.items, outcome)
        tally.count_batch(share.items, outcome.refused, seconds=monotonic() - began, lock_seconds=lock_seconds)
        if outcome.waits:
            waiting[share.partition] = outcome.waits
    crash_point("after_commit")
    for share, outcome in zip(shares, outcomes, strict=True):
        refusals.add(share.partition, outcome.refused)
    _publish(resources, shares, outcomes)
    return frozenset(share.partition for share in shares)


def _with_small_backlog(resources: Resources, turn: Stream) -> list[Partition]:
    """Return partitions that rang, that nothing stops, and whose backlogs are together less than a batch."""
    settings = resources.settings
    partitions = keys.partitions_of(settings.partitions)
    if isinstance(turn, Partition):
        partitions = (*partitions[turn.number :], *partitions[: turn.number])
    marks = resources.redis.mget([partition.rung for partition in partitions])
    rung = [partition for partition, mark in zip(partitions, marks, strict=True) if mark is not None]
    if len(rung) < 2:
        return []
    with resources.redis.pipeline(transaction=False) as pipe:
        for partition in rung:
            # A mark of a range in hand is a living drain's, or a dead one's. A failing one may spoil the round again.
            pipe.exists(partition.halted, partition.failing, partition.paused, partition.hand)
            pipe.xlen(partition.entries)
        replies = pipe.execute(raise_on_error=False)
    room, small = settings.batch_max_events - 1, []
    for partition, stopped, backlog in zip(rung, replies[0::2], replies[1::2], strict=True):
        # An error instead of a number: a broken key, which is for its drain.
        if stopped == 0 and isinstance(backlog, int) and 0 < backlog <= min(room, settings.read_chunk_events):
            small.append(partition)
            room -= backlog
    return small


def _turns(resources: Resources, postgres: Postgres, rung: Sequence[Partition]) -> dict[Partition, Turn]:
    """Take the locks of partitions; return the turns of those that no drain has and no pause stops."""
    turns = try_lock_partitions(postgres, [partition.number for partition in rung])
    free = {
        partition: turns[partition.number]
        for partition in rung
        if turns[partition.number].is_ours and not turns[partition.number].is_paused
    }
    for turn in list(free.values())[:1]:
        resources.in_force.take_up(postgres, turn.catalogue, turn.now)
    return free


def _take(resources: Resources, turns: dict[Partition, Turn], token: str, refusals: RefusalLog) -> list[_Share]:
    """Mark the partitions in hand, read and judge their entries; leave out those that need a drain of their own."""
    settings = resources.settings
    resources.redis.delete(*(partition.rung for partition in turns))
    requests = [
        calls.hand(partition, token, settings.hand_grace_ms, calls.InHand("-", settings.read_chunk_events, 0))
        for partition in turns
    ]
    taken = scripts.run_all(resources.redis, requests)
    read = read_small(resources.redis, list(turns), settings.read_chunk_events, settings.batch_max_bytes)
    shares = []
    for (partition, turn), taken_ms, entries in zip(turns.items(), taken, read, strict=True):
        books = UsageBooks(resources, partition, refusals)
        items = _judged(books, entries, turn)
        if items:
            shares.append(_Share(partition, books, items, int(taken_ms)))
    return shares


def _judged(books: UsageBooks, entries: Sequence[RawEntry], turn: Turn) -> list[Received]:
    """Judge the entries of a partition; none if a drain must look at them: some are refused, or two catalogues price
    them, or the stream is ahead of the clock.
    """
    if not entries:
        return []
    first, last = entries[0][0].decode("ascii"), entries[-1][0].decode("ascii")
    change = books.next_change(first, turn.now)
    if is_ahead(last, turn.now) or (change is not None and change <= stream_time(last, turn.now)):
        return []
    items = list(books.judge(entries, turn.now))
    return [] if any(isinstance(item, Refused) for item in items) else items


def _apply(postgres: Postgres, shares: Sequence[_Share], loaded: Loaded) -> list[Outcome]:
    """Work out the items of all partitions, write what becomes of their accounts, and commit it."""
    outcomes = [share.books.work_out(share.items, share.books.with_waiting(share.items, loaded)) for share in shares]
    crash_point("inside_transaction")
    writes = together(outcome.writes._replace(refused=[]) for outcome in outcomes)
    batch.append(postgres, writes, loaded.now)
    crash_point("rows_written")
    with postgres.pipeline():
        batch.update(postgres, 0, writes)
        for share, outcome in zip(shares, outcomes, strict=True):
            if outcome.refused:  # of two events with one id
                batch.update(postgres, share.partition.number, Writes.none()._replace(refused=outcome.refused))
        postgres.commit()
    return outcomes


@contextlib.contextmanager
def _spans(shares: Sequence[_Share]) -> Iterator[None]:
    """Have a span for the batch of each partition."""
    spans = [Processing(str(share.partition.name)) for share in shares]
    failed = None
    try:
        yield
    except psycopg.Error as error:
        failed = error
        raise
    finally:
        for share, span in zip(shares, spans, strict=True):
            span.end(share.items, failed)


def _publish(resources: Resources, shares: Sequence[_Share], outcomes: Sequence[Outcome]) -> None:
    """Publish all partitions in one pipeline."""
    requests = [
        share.books.publication(outcome, share.taken_ms) for share, outcome in zip(shares, outcomes, strict=True)
    ]
    replies = iter(scripts.run_all(resources.redis, [call for each in requests for call in each]))
    for share, outcome, own in zip(shares, outcomes, requests, strict=True):
        share.books.after_publication(outcome, [next(replies) for _ in own])
    crash_point("after_publish")


def _take_back(
    resources: Resources, marked: Sequence[Partition], token: str, waiting: Mapping[Partition, int]
) -> frozenset[Partition]:
    """Take the marks back: this process lives. Return the partitions with entries left, which ring again.

    Not those in which all that is left waits for a catalogue: that is noted, as a drain does.
    """
    again: list[Partition] = []
    if marked:
        with contextlib.suppress(redis.RedisError):
            client, ttl_ms = resources.redis, waiting_ttl_ms(resources.settings)
            left = scripts.run_all(client, [calls.done(partition, token) for partition in marked])
            again = [
                partition
                for partition, entries in zip(marked, left, strict=True)
                if entries > waiting.get(partition, 0)
            ]
            with client.pipeline(transaction=False) as pipe:
                for partition in again:
                    pipe.set(partition.rung, "1", nx=True, px=keys.RING_TTL_MS)
                for partition, number in waiting.items():
                    pipe.set(partition.waiting, number, px=ttl_ms)
                pipe.execute()
    return frozenset(again)
