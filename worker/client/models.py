"""Models that the catalogue does not know, as a client met them."""

from __future__ import annotations

from threading import Lock

from worker.client.effects import logger

# However many names a service comes up with, memory stays bounded.
_MOST_NAMES = 1_000
OTHERS = "(others)"


class UnknownModels:
    """Counts the lookups of models without a multiplier, and warns once for each. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.lookups: dict[str, int] = {}

    def begin_anew(self) -> None:
        """In a child after a fork: a thread of the parent may have held the lock."""
        self._lock = Lock()

    def count(self, model: object) -> None:
        """Count a lookup that found no multiplier, and took 1."""
        name = model[:64] if isinstance(model, str) else type(model).__name__
        with self._lock:
            if name not in self.lookups and len(self.lookups) >= _MOST_NAMES:
                name = OTHERS
            seen = self.lookups.get(name, 0)
            self.lookups[name] = seen + 1
        if not seen:
            logger.warning("the catalogue has no multiplier for model %r: it counts as 1", name)
