"""Apply one batch: from the stream, through one locked transaction, to Redis. `apply_batch` is the heart of meterfall.

This module has the order of the steps only. The books of a stream give its stream entries their meaning: worker/
consumer/usage.py for the partitions, worker/consumer/sponsorship.py for the pool. The hand (worker/consumer/hand.py)
chooses the range to read; the drain retries and halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Generic

from sqlalchemy import Engine

from worker.consumer.books import Books, ItemT, LoadedT, OutcomeT
from worker.consumer.hand import Batch, Hand, Range, Taken
from worker.consumer.publisher import Publisher
from worker.consumer.recovery import without_poison
from worker.consumer.refusals import RefusalLog
from worker.consumer.tally import Tally
from worker.crash import crash_point
from worker.keyspace.keys import Stream
from worker.ledger.connection import batch_connection
from worker.ledger.partitions import try_lock_partition
from worker.resources import CataloguesInForce


class Paused(Exception):
    """The partition is paused: a drain must leave it alone."""


@dataclass(frozen=True, slots=True)
class Desk(Generic[ItemT, LoadedT, OutcomeT]):
    """The tools of one drain: its stream's books, hand and publisher, and the catalogues that price its events.

    `tally` counts what it commits.
    """

    engine: Engine
    stream: Stream
    books: Books[ItemT, LoadedT, OutcomeT]
    hand: Hand[ItemT]
    publisher: Publisher[OutcomeT]
    refusals: RefusalLog
    poison_deaths: int
    in_force: CataloguesInForce
    tally: Tally


def apply_batch(
    desk: Desk[ItemT, LoadedT, OutcomeT], wanted: Range | Batch[ItemT], *, skip_locked: bool = False
) -> Batch[ItemT] | None:
    """Apply one batch of a stream, exactly once; return it, or None if the stream holds nothing more.

    `wanted` is a range to read, or a batch in hand already: a repeat after an error, or a part of one. With
    `skip_locked`, it leaves out accounts that another transaction holds; their stream entries stay.

    Raises Taken, Paused, Unreadable, and the errors of Postgres and Redis.
    Killed before the COMMIT, nothing happened. Killed after it, the stream entries are still there: the next drain
    reads them again, finds them recorded, and publishes them.
    """
    books, hand, began = desk.books, desk.hand, monotonic()
    with batch_connection(desk.engine) as postgres:
        # 1. Begin, and try the partition's lock: it falls with the transaction, and a drain that finds it taken ends.
        turn = try_lock_partition(postgres, desk.stream.number)
        if not turn.is_ours:
            raise Taken
        if turn.is_paused:
            raise Paused
        if desk.in_force.take_up(postgres, turn.catalogue, turn.now):
            hand.forget_ahead()
        # 2. Read the stream, oldest first, bounded in number and bytes, and mark the range as in hand.
        # 3. Judge each stream entry: an event, a refresh, or a dead letter with its reason.
        batch = hand.take(wanted, turn)
        if batch.last_id is None:
            return None
        crash_point("after_read")
        items = without_poison(postgres, books, batch, desk.poison_deaths)
        # 4. Lock the accounts in sorted order; then read balances, recorded events and the clock.
        asked = monotonic()
        loaded = books.load_for_update(postgres, items, skip_locked=skip_locked)
        locked = monotonic()
        # 5. Apply due boundaries.
        # 6. Drop duplicates: under the lock, no other transaction records them meanwhile.
        # 7. Take each amount down the waterfall, in the order of the stream.
        outcome = books.work_out(items, loaded)
        crash_point("inside_transaction")
        # 8. Write usage log, ledger entries and dead letters; update balances.
        books.append(postgres, outcome)
        crash_point("rows_written")
        with postgres.pipeline():
            books.update(postgres, outcome)
            # 9. COMMIT: the only one, in the same round trip.
            postgres.commit()
    books.count(desk.tally, items, outcome)
    desk.tally.count_batch(items, outcome.refused, seconds=monotonic() - began, lock_seconds=locked - asked)
    crash_point("after_commit")
    if outcome.refused:
        crash_point("after_dead_letter")
    desk.refusals.add(desk.stream, outcome.refused)
    hand.leave_out(outcome.in_use, outcome.waits)
    # 10. Publish: balances appear and ids leave pending, together; then the stream entries are deleted.
    desk.publisher.publish(outcome, hand.taken_ms, hand.trim_of(batch), in_background=batch.is_full)
    return batch
