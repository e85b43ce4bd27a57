"""Events on replicas before their call is answered: commands that travel with those of the call, in one round trip."""

from __future__ import annotations

from typing import Any

from redis import exceptions

from config.settings import Settings
from worker.keyspace import keys

Commands = tuple[tuple[Any, ...], ...]


class TooFewReplicas(exceptions.TimeoutError):
    """Redis has carried out the commands, but not enough replicas have them in time: a failover may lose them."""


def confirmation(settings: Settings) -> Commands:
    """Return the commands that wait for replicas after commands of the same connection; none if nothing waits.

    WAIT waits for the last write of its own connection alone. A repeat finds its event and writes nothing, perhaps on a
    new connection: WAIT would then answer at once, though no replica has the event. So a write goes before it.
    """
    if not settings.redis_wait_replicas:
        return ()
    return (
        ("SET", keys.CONFIRMED, "1"),
        ("WAIT", settings.redis_wait_replicas, settings.redis_wait_timeout_ms),
    )


def failed_confirmation(replies: list[Any], settings: Settings) -> Exception | None:
    """Return why the events before a `confirmation` with these replies are not confirmed; None if they are."""
    for reply in replies:
        if isinstance(reply, Exception):
            return reply
    wanted, found = settings.redis_wait_replicas, int(replies[-1])
    if found >= wanted:
        return None
    return TooFewReplicas(
        f"{found} of {wanted} replicas (METERFALL_REDIS_WAIT_REPLICAS) confirmed within "
        f"{settings.redis_wait_timeout_ms} ms"
    )
