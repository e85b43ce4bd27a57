"""The differences between an edited catalogue and what is in force, with the number of accounts that each concerns.

Both are compared: the terms of open periods, which may be older than the catalogue in force, and every value of the two
catalogues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from config.catalogue import Allowance, Catalogue
from worker.ledger.accounts import terms_in_force
from worker.ledger.catalogues import meters_in_use, plans_in_use
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.periods import Terms, terms_of


class Difference(NamedTuple):
    """One value that differs, before and after, and the number of open accounts that it concerns.

    `plan` and `meter` are empty for a value that belongs to none. A difference of terms takes effect with the next
    period of the accounts. `accounts` is None if it is unknown: nothing says which accounts will use a model or the
    sponsorship pool.
    """

    plan: str
    meter: str
    field: str
    in_force: object
    catalogue: object
    accounts: int | None


class _Place(NamedTuple):
    """A value of a catalogue: `field` is its key below the plan, the meter or the file."""

    plan: str
    meter: str
    field: str


def differences(resources: Resources, catalogue: Catalogue) -> list[Difference]:
    """List every difference between `catalogue` and the one in force or the terms of open periods. Reads only.

    A plan that the catalogue lacks keeps its terms.
    """
    with batch_connection(resources.engine) as postgres:
        in_force = terms_in_force(postgres)
        on_plan = {use.name: use.accounts for use in plans_in_use(postgres) if use.how == "on"}
        on_meter = {use.name: use.accounts for use in meters_in_use(postgres)}
    found: dict[tuple[str, ...], Difference] = {}
    for plan, meter, terms, accounts in in_force:
        for field, now, then in _differing(catalogue, plan, meter, terms):
            # The query counts accounts that differ in another field also apart.
            same = found.setdefault((plan, meter, field, repr(now)), Difference(plan, meter, field, now, then, 0))
            found[plan, meter, field, repr(now)] = same._replace(accounts=(same.accounts or 0) + accounts)

    for difference in _between(resources.catalogue, catalogue, on_plan, on_meter):
        # Of terms that accounts have, the row above gives the accounts.
        found.setdefault((*difference[:3], repr(difference.in_force)), difference)
    return list(found.values())


def _differing(catalogue: Catalogue, plan: str, meter: str, terms: Terms) -> list[tuple[str, object, object]]:
    """Return the fields in which `terms` differ from the plan's, with both values."""
    if plan not in catalogue.plans:
        return [("plan", plan, "gone; terms stay")]
    both = zip(Terms._fields, terms, terms_of(catalogue, plan, meter), strict=True)
    return [(field, _shown(field, now), _shown(field, then)) for field, now, then in both if now != then]


def _shown(field: str, value: object) -> object:
    if field == "allowance":
        return "unlimited" if value is None else value
    return "none" if value is None else value


# ---------------------------------------------------------------------------------------------------------------------
# The values of two catalogues

_NONE = "none"
# Terms that a plan takes from the meter and from its own time zone.
_DERIVED_TERMS = ("spill", "timezone")


def _between(
    old: Catalogue, new: Catalogue, on_plan: Mapping[str, int], on_meter: Mapping[str, int]
) -> Iterator[Difference]:
    """Yield the values that differ between two catalogues."""
    gone, added = old.plans.keys() - new.plans.keys(), new.plans.keys() - old.plans.keys()
    for plan in sorted(gone):
        if not on_plan.get(plan):  # else the terms of its accounts say it
            yield Difference(plan, "", "plan", plan, "gone", 0)
    for plan in sorted(added):
        yield Difference(plan, "", "plan", _NONE, "new", 0)
    before, after = _values_of(old), _values_of(new)
    for place in sorted(before.keys() | after.keys()):
        was, becomes = before.get(place, _NONE), after.get(place, _NONE)
        if was == becomes or place.plan in gone:
            continue
        yield Difference(*place, was, becomes, _concerned(place, on_plan, on_meter))


def _concerned(place: _Place, on_plan: Mapping[str, int], on_meter: Mapping[str, int]) -> int | None:
    """Return the number of open accounts that a value concerns; None if unknown."""
    if place.plan:
        # Accounts are counted by the terms of their open periods; none has these.
        return 0 if place.field in Terms._fields and place.meter else on_plan.get(place.plan, 0)
    return on_meter.get(place.meter, 0) if place.meter else None


def _values_of(catalogue: Catalogue) -> dict[_Place, object]:
    """Return every value of a catalogue by its place."""
    values: dict[_Place, object] = {}
    for meter, about in catalogue.meters.items():
        values |= {_Place("", meter, field): value for field, value in about}
    for code, plan in catalogue.plans.items():
        values |= {
            _Place(code, "", field): _shown(field, value) for field, value in plan if field not in ("meters", "trial")
        }
        for meter, allowance in plan.meters.items():
            values |= _terms_at(code, meter, "", terms_of(catalogue, code, meter))
            values |= _draw_at(code, meter, "", allowance)
        for meter, allowance in plan.trial.meters.items() if plan.trial else ():
            values |= _terms_at(code, meter, "trial.", terms_of(catalogue, code, meter, on_trial=True))
            values |= _draw_at(code, meter, "trial.", allowance)
    whole: dict[str, object] = {
        f"multipliers.{model}": multiplier for model, multiplier in catalogue.multipliers.items()
    }
    whole |= {f"backends.{code}": backend.kind for code, backend in catalogue.backends.items()}
    pool = catalogue.sponsorship
    whole |= {"sponsorship.initial": pool.initial, "sponsorship.paid_share_percent": pool.paid_share_percent}
    whole |= {f"sponsorship.daily_budget.{tier}": units for tier, units in pool.daily_budget.items()}
    return {**values, **{_Place("", "", field): value for field, value in whole.items()}}


def _terms_at(plan: str, meter: str, prefix: str, terms: Terms) -> dict[_Place, object]:
    """Return the terms of a plan on a meter by their places."""
    return {
        _Place(plan, meter, prefix + field): _shown(field, value)
        for field, value in terms._asdict().items()
        if field not in _DERIVED_TERMS
    }


def _draw_at(plan: str, meter: str, prefix: str, allowance: Allowance) -> dict[_Place, object]:
    """Return wallet and price of a meter by their places; nothing of one that has buckets of its own."""
    if allowance.wallet is None:
        return {}
    return {_Place(plan, meter, prefix + field): getattr(allowance, field) for field in ("wallet", "price")}
