"""Events that came again after everything but the ledger had forgotten them. Pure.

A retry comes soon. An event that comes again later may be other work under a key used twice, which is not billed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from worker.rules.entry_times import entered_at
from worker.rules.received import Event, Received
from worker.rules.rows import LateRepeat, Loaded


def duplicate_ages(received: Sequence[Received], loaded: Loaded) -> list[timedelta]:
    """Return for each duplicate of a batch how long after the first of its identity was applied it came in.

    None is younger than 0: it may come in before the first is applied, and in the same batch. A batch that is read
    again after a kill has such ones only.
    """
    first = dict(loaded.recorded)
    ages = []
    for item in received:
        if not isinstance(item, Event) or item.user_id in loaded.in_use:
            continue
        identity = item.user_id, item.event_id
        fingerprint = item.meter, item.quantity, item.multiplier
        if first.setdefault(identity, fingerprint) is fingerprint:
            continue
        if first[identity] == fingerprint:
            applied_at = loaded.applied_at.get(identity, loaded.now)
            ages.append(max(timedelta(0), entered_at(item.entry_id, loaded.now) - applied_at))
    return ages


def late_repeats(received: Sequence[Received], loaded: Loaded, outcome_ttl: timedelta) -> list[LateRepeat]:
    """Return the events of a batch that were recorded more than `outcome_ttl` before they came in again.

    One for each event id, in the lock order. The time of the stream entry counts: an entry that is read again after a
    kill came in before it was recorded.
    """
    found: dict[tuple[str, str], LateRepeat] = {}
    for item in received:
        if not isinstance(item, Event) or item.user_id in loaded.in_use:
            continue
        identity = item.user_id, item.event_id
        applied_at = loaded.applied_at.get(identity)
        if applied_at is None or loaded.recorded[identity] != (item.meter, item.quantity, item.multiplier):
            continue
        came_at = entered_at(item.entry_id, loaded.now)
        if came_at - applied_at > outcome_ttl:
            owner = loaded.closed.get(item.user_id, item.user_id)
            times = found[identity].times if identity in found else 0
            found[identity] = LateRepeat(owner, item.event_id, times + 1, came_at)
    return [found[identity] for identity in sorted(found)]
