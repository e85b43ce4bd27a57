"""The effect of an edited catalogue: terms in force on open periods beside the terms that the catalogue grants now."""

from __future__ import annotations

from typing import NamedTuple

from config.catalogue import Catalogue
from worker.ledger.accounts import terms_in_force
from worker.ledger.connection import batch_connection
from worker.resources import Resources
from worker.rules.periods import Terms, terms_of


class Difference(NamedTuple):
    """One field of one meter that differs, and the number of its accounts. They take the new value with their next
    period.
    """

    plan: str
    meter: str
    field: str
    in_force: object
    catalogue: object
    accounts: int


def differences(resources: Resources, catalogue: Catalogue) -> list[Difference]:
    """List every difference between open periods and `catalogue`. Reads only.

    A plan that the catalogue lacks keeps its terms.
    """
    with batch_connection(resources.engine) as postgres:
        in_force = terms_in_force(postgres)
    found: dict[tuple[str, ...], Difference] = {}
    for plan, meter, terms, accounts in in_force:
        for field, now, then in _differing(catalogue, plan, meter, terms):
            # The query counts accounts that differ in another field also apart.
            same = found.setdefault((plan, meter, field, repr(now)), Difference(plan, meter, field, now, then, 0))
            found[plan, meter, field, repr(now)] = same._replace(accounts=same.accounts + accounts)
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
