"""What an edited catalogue would change: the terms in force on open periods beside what the catalogue grants now."""

from __future__ import annotations

from typing import NamedTuple

from config.catalogue import Catalogue
from worker import ledger
from worker.drain import Tools
from worker.periods import Terms, terms_of


class Difference(NamedTuple):
    """One field of one meter that differs, on so many accounts; they take it over with their next period."""

    plan: str
    meter: str
    field: str
    in_force: object
    catalogue: object
    accounts: int


def differences(tools: Tools, catalogue: Catalogue) -> list[Difference]:
    """Everything on which open periods and `catalogue` differ. A plan that is gone keeps its terms. Reads only."""
    with ledger.batch_connection(tools.engine) as postgres:
        in_force = ledger.terms_in_force(postgres)
    found = []
    for plan, meter, terms, accounts in in_force:
        if plan not in catalogue.plans:
            found.append(Difference(plan, meter, "plan", plan, "gone; terms stay", accounts))
            continue
        granted = terms_of(catalogue, plan, meter)
        for field in Terms._fields:
            now, then = getattr(terms, field), getattr(granted, field)
            if now != then:
                found.append(Difference(plan, meter, field, _shown(field, now), _shown(field, then), accounts))
    return found


def _shown(field: str, value: object) -> object:
    if field == "allowance":
        return "unlimited" if value is None else value
    return "none" if value is None else value
