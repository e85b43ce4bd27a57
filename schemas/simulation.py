"""The answer of a simulation, as `catalogue simulate … --json` prints it.

Amounts are whole units of the meter that pays, times UTC. `paid` is what was really paid, `simulated` what would have
been. Units of different meters are never added.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from schemas.answers import Answer, Parts


class SimulatedMeter(Answer):
    """What the events on one paying meter paid, and would have paid. `events` and `accounts` are of the two together.

    `meter` is a wallet for events that draw on it: an event that would draw on another one counts on both meters.
    """

    meter: str
    accounts: int
    events: int
    paid: Parts
    simulated: Parts


class SimulatedPlan(Answer):
    """The same for accounts while they were on `plan`; "" for events without an account.

    `simulated_plan` is the plan tried instead. The prices are those of a month, in cents, in the catalogue in force and
    in the one tried; None if that lacks the plan.
    """

    plan: str
    simulated_plan: str
    price_month_cents: int | None
    simulated_price_month_cents: int | None
    meters: tuple[SimulatedMeter, ...]


class SimulatedAccount(Answer):
    """The same for one account and meter. `difference` is the number of units that another bucket would have paid."""

    user_id: str
    meter: str
    events: int
    paid: Parts
    simulated: Parts
    difference: int


class SimulationReport(Answer):
    """Events of a window under another catalogue: what they would have paid, beside what they paid.

    The window has the events that were applied from `since` up to, and without, `until`, without those that were
    reversed in it. `catalogue` is the digest of the one tried, `in_force` that of the one in force at `since`.
    `accounts` were simulated, of which `changed` would have paid otherwise; a `sample` is chosen by the hash of ids.
    `refused` are events that cost more of a wallet than any event may. `most_changed` has the accounts with the
    greatest differences; `more` says that others differ also. `unknown` says what no simulation can know.
    """

    report: Literal["simulation"] = "simulation"
    since: datetime
    until: datetime
    catalogue: str
    in_force: str
    plans_tried: dict[str, str]
    sample: int | None
    accounts: int
    changed: int
    events: int
    refused: int
    meters: tuple[SimulatedMeter, ...]
    plans: tuple[SimulatedPlan, ...]
    most_changed: tuple[SimulatedAccount, ...]
    more: bool
    unknown: tuple[str, ...]
