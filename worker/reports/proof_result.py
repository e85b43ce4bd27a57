"""The result of the last proof, kept in Redis for `status` and monitoring."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import redis
from pydantic import ValidationError

from schemas.status import ProofStatus
from worker.keyspace import keys
from worker.keyspace.connection import redis_now_ms
from worker.reports.proof import VerifyReport

# As many as an operator reads at once; `verify` names all.
_FIRST = 20


def keep_result(client: redis.Redis, report: VerifyReport, differences: int) -> None:
    """Keep the result of a proof that ended, in place of the one before. Repeating is harmless.

    `differences` counts all; the report may have the first of them only.

    A role that may only read, and a Redis without memory, keep nothing: the proof itself stands all the same.
    """
    with suppress(redis.exceptions.NoPermissionError, redis.OutOfMemoryError, redis.exceptions.ReadOnlyError):
        result = ProofStatus(
            finished_at=datetime.fromtimestamp(redis_now_ms(client) / 1_000, UTC),
            accounts=report.accounts,
            from_zero=report.from_zero,
            from_checkpoint=report.from_checkpoint,
            changes=report.changes,
            pending_maps=report.pending_maps,
            differences=differences,
            first=tuple(report.found[:_FIRST]),
        )
        client.set(keys.PROVED, result.model_dump_json())


def read_result(client: redis.Redis) -> ProofStatus | None:
    """Return the result of the last proof; None without one, or if another release wrote it in a form of its own."""
    raw = client.get(keys.PROVED)
    try:
        return ProofStatus.model_validate_json(raw) if raw is not None else None
    except ValidationError:
        return None
