"""Dead letters in the hands of operators: list, group, replay, drop. Rows are never deleted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from config.settings import Settings
from schemas.events import SIGNATURE_REFUSALS
from worker.errors import BadInput
from worker.keyspace import keys
from worker.keyspace.entries import owner_of, plain_entry
from worker.keyspace.signatures import signer_of
from worker.ledger.connection import Postgres, batch_connection
from worker.ledger.dead_letters import (
    DeadLetter,
    Group,
    GroupKey,
    Wanted,
    count_wanted,
    group_dead_letters,
    lock_dead_letter,
    open_dead_letter_ids,
    read_dead_letters,
    resolve_dead_letter,
)
from worker.resources import Resources
from worker.rules.account import UNSAID, Cause


class DeadLetterError(BadInput):
    """The command cannot handle this dead letter; the message says why."""


class Page(NamedTuple):
    """Some dead letters, oldest first, and how many there are in all."""

    letters: list[DeadLetter]
    total: int


def listed(
    resources: Resources, *, state: str = "open", reason: str | None = None, limit: int = 100
) -> list[DeadLetter]:
    """List dead letters in `state`, oldest first, at most `limit`.

    With a `reason`, lists the letters of that reason only.
    """
    return page(resources, Wanted(state, reason), limit=limit).letters


def page(resources: Resources, wanted: Wanted, *, after: int = 0, limit: int = 100) -> Page:
    """Return the wanted dead letters with ids above `after`, oldest first, at most `limit`; the total counts all."""
    with batch_connection(resources.engine) as postgres:
        letters = read_dead_letters(postgres, wanted, after=after, limit=limit)
        return Page(letters, count_wanted(postgres, wanted))


def summary(resources: Resources, wanted: Wanted, by: GroupKey = "reason") -> list[Group]:
    """Return the wanted dead letters in groups of one reason, and of one `by` if that is another key."""
    with batch_connection(resources.engine) as postgres:
        return group_dead_letters(postgres, wanted, by)


def open_ids(resources: Resources, reason: str) -> list[int]:
    """Return the ids of all open dead letters of one reason, oldest first."""
    with batch_connection(resources.engine) as postgres:
        return open_dead_letter_ids(postgres, reason)


def show(resources: Resources, letter_id: int) -> DeadLetter:
    """Return one dead letter. Raises DeadLetterError if there is none."""
    with _letter(resources, letter_id) as (_, letter):
        return letter


def replay(
    resources: Resources, letter_id: int, *, vouch: bool = False, cause: Cause = UNSAID, letters: int = 1
) -> str:
    """Append the payload to its user's stream again, in its trace; return the id of the new stream entry.

    The row keeps the `cause`, who replays it and why, and the number of `letters` that the operator replays with it.

    If workers check signatures, this process signs the event with its own key, as the producer's key may have ended. It
    does so by itself only if the producer's signature was right; else an operator must vouch for the event. Safe to
    repeat: an event applied twice is a duplicate. Killed in between, the letter stays open and may be replayed again.
    Raises DeadLetterError unless the letter is open, kept whole, and an event.
    """
    with _letter(resources, letter_id) as (postgres, letter):
        _require_open(letter)
        origin = keys.stream_of(letter.partition)
        if isinstance(origin, keys.Sponsorship):
            raise DeadLetterError(f"{letter_id}: came from the pool's stream, which only our scripts write; drop it")
        if letter.payload_bytes != len(letter.payload):
            raise DeadLetterError(f"{letter_id}: only {len(letter.payload)} of {letter.payload_bytes} bytes are kept")
        vouched = vouch or letter.signed_by is not None
        if not vouched and _must_be_vouched_for(letter, resources.settings):
            raise DeadLetterError(
                f"{letter_id}: no key vouches for it; `dead show {letter_id}`, then `dead replay {letter_id} --vouch`"
            )
        owner = owner_of(letter.payload)
        partition = keys.partition_of(owner[0], resources.settings.partitions) if owner else origin
        entry = plain_entry(letter.payload, signer_of(resources.settings) if vouched else None, letter.traceparent)
        entry_id = resources.redis.xadd(partition.entries, entry)
        resources.ring(partition)
        resolve_dead_letter(postgres, letter_id, "replayed", cause, letters)
        postgres.commit()
        return entry_id.decode() if isinstance(entry_id, bytes) else str(entry_id)


def drop(resources: Resources, letter_id: int, *, cause: Cause = UNSAID, letters: int = 1) -> None:
    """Close a dead letter for good. The row keeps the `cause` and the number of `letters`, as `replay` does.

    Raises DeadLetterError unless it is open.
    """
    with _letter(resources, letter_id) as (postgres, letter):
        _require_open(letter)
        resolve_dead_letter(postgres, letter_id, "dropped", cause, letters)
        postgres.commit()


@contextmanager
def _letter(resources: Resources, letter_id: int) -> Iterator[tuple[Postgres, DeadLetter]]:
    with batch_connection(resources.engine) as postgres:
        letter = lock_dead_letter(postgres, letter_id)
        if letter is None:
            raise DeadLetterError(f"id: no dead letter {letter_id}")
        yield postgres, letter


def _must_be_vouched_for(letter: DeadLetter, settings: Settings) -> bool:
    """True if a replay would need a missing signature, or overlook a wrong one."""
    refused = letter.reason in SIGNATURE_REFUSALS
    return settings.signatures == "required" or (settings.signatures == "optional" and refused)


def _require_open(letter: DeadLetter) -> None:
    if letter.state != "open":
        raise DeadLetterError(f"{letter.id}: is {letter.state} already")
