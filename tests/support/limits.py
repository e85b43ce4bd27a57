"""Days of one user with limits: the clock, events, and the limits themselves."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from tests.support.ledger import stop_clock
from tests.support.streams import account_of, drain, partition_of
from worker.admin import limits
from worker.resources import Resources

USER, METER = "ann", "premium_voice"


def send(resources: Resources, event_id: str, quantity: int, meter: str = METER, **facts: Any) -> None:
    """Put an event of the user into its stream."""
    event = {"event_id": event_id, "user_id": USER, "meter": meter, "quantity": quantity, **facts}
    resources.redis.xadd(partition_of(resources.settings, USER).entries, {"v": "1", "e": json.dumps(event)})


def use(resources: Resources, event_id: str, quantity: int, meter: str = METER, **facts: Any) -> None:
    """Put an event of the user into its stream, and apply it."""
    send(resources, event_id, quantity, meter, **facts)
    drain(resources.settings, USER)


def go_to(resources: Resources, moment: datetime) -> None:
    """Let time come to a moment; a cached balance whose end it passes is gone."""
    stop_clock(resources.settings, moment)
    resources.redis.delete(account_of(resources.settings, USER).balance)


def limit(resources: Resources, per: str, amount: int | None, meter: str = METER, **how: Any) -> Any:
    """Give the user a limit, and apply it."""
    change = limits.set_limit(resources, USER, meter, per, amount, **how)
    drain(resources.settings, USER)
    return change
