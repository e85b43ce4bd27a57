"""Grants of credit: which of them pay first, when they start and when they end. Pure rules, no I/O.

The purchased units of a meter are the sum of what is left of the grants in force. Credit that belongs to no order, such
as an adjustment or what was there before grants were kept, is one unnamed grant: paid, without an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, cast, get_args

Category = Literal["paid", "promotional"]
CATEGORIES = cast("tuple[Category, ...]", get_args(Category))
FIRST_PRIORITY, LAST_PRIORITY, DEFAULT_PRIORITY = 0, 100, 50
# The grants that one meter of an account may have at once: its row holds them all.
MAX_GRANTS = 1_000

# No order has this key.
UNNAMED = ""
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class Grant(NamedTuple):
    """Credit of one order: `left` of the units `given`. An unnamed grant has key "" and no number of units given.

    It pays from `effective_at` until `expires_at`; None: it never ends. Priority 0 pays first, 100 last.
    """

    key: str
    given: int | None
    left: int
    category: Category
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    created_at: datetime

    def has_ended(self, at: datetime) -> bool:
        """True if it pays nothing any more at the moment `at`."""
        return self.expires_at is not None and self.expires_at <= at

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        return {
            "key": self.key,
            "given": self.given,
            "left": self.left,
            "category": self.category,
            "priority": self.priority,
            "effective_at": self.effective_at.isoformat(),
            "expires_at": self.expires_at and self.expires_at.isoformat(),
            "created_at": self.created_at.isoformat(),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Grant:
        """Return the value that `as_json` wrote."""
        return cls(
            key=stored["key"],
            given=stored["given"],
            left=stored["left"],
            category=stored["category"],
            priority=stored["priority"],
            effective_at=datetime.fromisoformat(stored["effective_at"]),
            expires_at=stored["expires_at"] and datetime.fromisoformat(stored["expires_at"]),
            created_at=datetime.fromisoformat(stored["created_at"]),
        )


def unnamed(units: int) -> Grant:
    """Return `units` of credit that belong to no order."""
    return Grant(UNNAMED, None, units, "paid", DEFAULT_PRIORITY, _LONG_AGO, None, _LONG_AGO)


class Grants(NamedTuple):
    """The grants of one meter that have something left: those in force, in the order in which they pay, and others.

    `to_come` start later, the next one first; their units are not purchased yet.
    """

    in_force: tuple[Grant, ...] = ()
    to_come: tuple[Grant, ...] = ()

    def units(self) -> int:
        """Return the units left of the grants in force: the purchased units."""
        return sum(grant.left for grant in self.in_force)

    def of(self, key: str) -> Grant | None:
        """Return the grant with this key that has something left, in force or to come."""
        return next((grant for grant in (*self.in_force, *self.to_come) if grant.key == key), None)

    def boundaries(self) -> list[datetime]:
        """Return the moments at which a grant starts or ends, in no order."""
        starts = [grant.effective_at for grant in self.to_come]
        return starts + [grant.expires_at for grant in (*self.in_force, *self.to_come) if grant.expires_at is not None]

    def take(self, units: int, first: str | None = None) -> tuple[Grants, dict[str, int]]:
        """Take `units` in the order in which grants pay, from the grant `first` before all others.

        That one may be yet to come; no other such grant gives anything. Returns what is left, and the units that each
        grant gave, by key: together fewer than `units` if there are no more.
        """
        used: dict[str, int] = {}
        grants = self
        own = self.of(first) if first is not None and units else None
        if own is not None:
            used[own.key] = min(units, own.left)
            units -= used[own.key]
            grants = self.less(used)
        emptied = 0
        for grant in grants.in_force:  # only the first ones: an event costs the same however many wait behind them
            if units < grant.left:
                break
            used[grant.key] = grant.left
            units -= grant.left
            emptied += 1
        rest = grants.in_force[emptied:]
        if units and rest:
            used[rest[0].key] = units
            rest = (rest[0]._replace(left=rest[0].left - units), *rest[1:])
        return Grants(rest, grants.to_come), used

    def take_at(
        self, units: int, at: datetime, first: str | None = None, *, started: bool = True
    ) -> tuple[Grants, dict[str, int]]:
        """Do the same as `take` by the moment `at`, though a start or an end until then is not stored yet.

        A grant that has ended gives something only if none is `first`, and after all others: for whom nothing else is
        left to take, its units are better than a debt. One that has `started` gives as those in force do.
        """
        own = self.of(first) if first is not None else None
        due = [grant for grant in self.to_come if started and grant.effective_at <= at]
        open_now = [grant for grant in sorted((*self.in_force, *due), key=burn_order) if not grant.has_ended(at)]
        ended = [grant for grant in self.in_force if grant.has_ended(at)] if first is None else []
        used: dict[str, int] = {}
        for grant in (*((own,) if own else ()), *open_now, *ended):
            if not units:
                break
            part = min(units, grant.left) if grant.key not in used else 0
            if part:
                used[grant.key] = part
                units -= part
        return self.less(used), used

    def less(self, used: Mapping[str, int]) -> Grants:
        """Return the grants without the units that each gave, by key; those with nothing left are gone."""
        return Grants(*(_less(grants, used) for grants in self))

    def plus(self, more: Iterable[Grant], *, to_come: bool = False) -> Grants:
        """Return the grants with these in force also; with `to_come`, they start later.

        A grant that is there already takes the units of one with its key.
        """
        here = {grant.key: grant for grant in (self.to_come if to_come else self.in_force)}
        for grant in more:
            known = here.get(grant.key)
            here[grant.key] = grant if known is None else known._replace(left=known.left + grant.left)
        ordered = tuple(sorted(here.values(), key=_next_first if to_come else burn_order))
        return self._replace(to_come=ordered) if to_come else self._replace(in_force=ordered)

    def without(self, key: str) -> Grants:
        """Return the grants without this one."""
        return Grants(*(tuple(grant for grant in grants if grant.key != key) for grants in self))

    def last(self, units: int) -> tuple[Grant, ...]:
        """Return `units` of the grants that pay last: each with the part of it that is among them."""
        found = []
        for grant in reversed(self.in_force):
            if not units:
                break
            found.append(grant._replace(left=min(units, grant.left)))
            units -= found[-1].left
        return tuple(reversed(found))

    def packed(self) -> Grants | None:
        """Return it as a balance keeps it: None if there is nothing but unnamed credit."""
        return None if not self.to_come and all(grant.key == UNNAMED for grant in self.in_force) else self

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; `from_json` reads it."""
        return {name: [grant.as_json() for grant in grants] for name, grants in self._asdict().items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Grants:
        """Return the value that `as_json` wrote."""
        return cls(*(tuple(map(Grant.from_json, stored[name])) for name in cls._fields))


def burn_order(grant: Grant) -> tuple[Any, ...]:
    """Return the sort key of grants in the order in which they pay.

    That is priority, end (the soonest first, never last), promotional before paid, start, creation; at last the key.
    """
    ends = (1, _LONG_AGO) if grant.expires_at is None else (0, grant.expires_at)
    is_paid = grant.category == "paid"
    return (grant.priority, ends, is_paid, grant.effective_at, grant.created_at, grant.key)


def _next_first(grant: Grant) -> tuple[Any, ...]:
    return (grant.effective_at, burn_order(grant))


def _less(grants: tuple[Grant, ...], used: Mapping[str, int]) -> tuple[Grant, ...]:
    if not any(grant.key in used for grant in grants):
        return grants
    reduced = (grant._replace(left=grant.left - used[grant.key]) if grant.key in used else grant for grant in grants)
    return tuple(grant for grant in reduced if grant.left)


class Boundary(NamedTuple):
    """A moment at which a grant changes by itself: it starts, or what is left of it expires."""

    at: datetime
    kind: Literal["start", "expire"]
    grant: Grant


def due_boundary(grants: Grants, until: datetime) -> Boundary | None:
    """Return the first boundary of the grants that is due at `until`. Of two at one moment, an end comes first."""
    due = [Boundary(grant.effective_at, "start", grant) for grant in grants.to_come]
    due += [Boundary(grant.expires_at, "expire", grant) for grant in grants.in_force if grant.expires_at is not None]
    first = min(due, default=None, key=lambda each: (each.at, each.kind, burn_order(each.grant)))
    return first if first is not None and first.at <= until else None


def after_boundary(grants: Grants, boundary: Boundary) -> Grants:
    """Return the grants after one of them started or expired."""
    left = grants.without(boundary.grant.key)
    return left.plus([boundary.grant]) if boundary.kind == "start" else left
