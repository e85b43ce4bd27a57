"""The catalogues of a ledger over time: which one prices an event. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from config.catalogue import Catalogue


@dataclass(frozen=True, slots=True)
class Timeline:
    """The catalogues in force, oldest first, each from its moment on; the first also counts for all time before it.

    `version` is the newest one registered. 0: the ledger has none, and a process goes by the file that it carries.
    """

    version: int
    changes: tuple[tuple[datetime, Catalogue], ...]
    # Meter → backends with a sub-cap in any of them: pending ids may count against each.
    capped_backends: Mapping[str, tuple[str, ...]]
    # Cached views, by the places of two catalogues; see `at`.
    _views: dict[tuple[int, int], Catalogue] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, version: int, registered: Sequence[tuple[datetime, Catalogue]]) -> Timeline:
        """Return the timeline of catalogues in the order of their registration.

        One takes the place of all before it that were yet to come into force then, or come later than it.
        """
        changes: list[tuple[datetime, Catalogue]] = []
        for effective_from, catalogue in registered:
            changes = [change for change in changes if change[0] < effective_from]
            changes.append((effective_from, catalogue))
        capped: dict[str, set[str]] = {}
        for _, catalogue in changes:
            for meter, backends in catalogue.capped_backends.items():
                capped.setdefault(meter, set()).update(backends)
        return cls(version, tuple(changes), {meter: tuple(sorted(found)) for meter, found in capped.items()})

    def at(self, moment: datetime, now: datetime) -> Catalogue:
        """Return the catalogue in force at `moment`, as known at `now`.

        Meters and plans that came into force between both count in it already: an event waited, or its account moved.
        """
        then = self._place_of(moment)
        latest = max(then, self._place_of(now))
        if then == latest:
            return self.changes[then][1]
        found = self._views.get((then, latest))
        if found is None:
            found = self.changes[then][1]
            for _, later in self.changes[then + 1 : latest + 1]:
                found = found.with_additions_of(later)
            self._views[then, latest] = found
        return found

    def next_change(self, moment: datetime) -> datetime | None:
        """Return when another catalogue comes into force after `moment`; None without one."""
        return next((since for since, _ in self.changes[1:] if since > moment), None)

    def between(self, first: datetime, last: datetime) -> list[Catalogue]:
        """Return the catalogues in force at some moment from `first` to `last`, oldest first."""
        return [catalogue for _, catalogue in self.changes[self._place_of(first) : self._place_of(last) + 1]]

    def to_come(self, now: datetime) -> list[Catalogue]:
        """Return the catalogues that are yet to come into force."""
        return [catalogue for _, catalogue in self.changes[self._place_of(now) + 1 :]]

    def _place_of(self, moment: datetime) -> int:
        return max(0, sum(since <= moment for since, _ in self.changes) - 1)


def missing_default_plan(plan: str) -> str:
    """Return what is wrong if the catalogue in force lacks the default plan of the settings."""
    return (
        f"METERFALL_DEFAULT_PLAN: the catalogue in force has no plan {plan!r}, so no account is opened, and events of "
        "users without one wait"
    )


# The remedy.
ADD_DEFAULT_PLAN = "`meterfall catalogue apply FILE` with that plan, or set another one"


def other_catalogue(own: str, in_force: str) -> str:
    """Return what a process says at its start if it carries another catalogue than the one in force."""
    return (
        f"this process carries catalogue {own}, but {in_force} is in force and prices every event: deploy that file "
        "here, or make this one the one in force with `meterfall catalogue apply FILE`"
    )
