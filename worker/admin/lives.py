"""Acknowledge that Redis lost its data."""

from __future__ import annotations

from worker.admin.change import cause_of
from worker.keyspace import keys
from worker.ledger import lives
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.lives import Life


def acknowledge(resources: Resources, *, actor: str, reason: str) -> list[Life]:
    """Acknowledge each loss that the ledger knows and nobody has acknowledged; return them, oldest first.

    `status`, `health` and the metrics then say no more of them. A later loss is said anew. Safe to repeat: each keeps
    its first acknowledgement. Killed before the COMMIT, nothing happened.
    Raises BadInput for an actor or a reason that does not fit.
    """
    cause = cause_of(actor, reason)
    with batch_connection(resources.engine) as postgres:
        done = lives.acknowledge_lives(postgres, cause)
        postgres.commit()
    resources.redis.set(keys.FOUND_EMPTY, 0)  # dynos of the former release go by it alone
    return done
