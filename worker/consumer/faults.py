"""Faults of the configuration as a dyno meets them: each in one line, with the login and the role that it needs."""

from __future__ import annotations

import redis

from config.log import described
from config.settings import Settings
from worker.keyspace.faults import fault_of as redis_fault
from worker.ledger.faults import INSUFFICIENT_PRIVILEGE
from worker.ledger.faults import fault_of as ledger_fault

# As messages about missing rights name it.
_COMMAND, _ROLE = "worker run", "worker"


def fault_of(error: BaseException, settings: Settings, *, of_queue: bool = False) -> str | None:
    """Return the fault of the configuration that a server named; None for an outage, and for errors of ours.

    `of_queue`: the Redis of the queue, which may be another one, raised the error.
    """
    return redis_fault(error, settings, command=_COMMAND, role=_ROLE, of_queue=of_queue) or ledger_fault(
        error, settings, command=_COMMAND, role=f"meterfall_{_ROLE}"
    )


def explained(error: BaseException, settings: Settings) -> str:
    """Describe an error at work in one line without user data; a missing right as the start of a dyno would."""
    code = getattr(error, "sqlstate", None)
    is_denial = isinstance(error, redis.RedisError) or code == INSUFFICIENT_PRIVILEGE
    found = fault_of(error, settings) if is_denial else None
    return described(error) if found is None else f"{found} ({code})" if code else found
