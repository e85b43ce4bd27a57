"""The recipe for payment webhooks is run as it stands: every block in order, every balance that it shows.

Comments of the recipe, which its readers do not see, say what happens between two blocks: the clock, and usage.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from config.settings import Settings
from distributions.client import public
from tests.support.ledger import move_clock
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.streams import drain, partition_of
from worker.accounts import Accounts
from worker.reports.proof import verify_ledger

RECIPE = (ROOT / "docs/payment-webhooks.md").read_text(encoding="utf-8")
METER = "premium_voice"

_STEP = re.compile(
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$"
    r"|^<!-- now (?P<now>\S+) -->$"
    r"|^<!-- (?P<spender>\S+) spends (?P<amount>\d+) -->$",
    re.MULTILINE | re.DOTALL,
)


def steps_of(text: str) -> Iterator[dict[str, Any]]:
    """Blocks and comments of the recipe, in order."""
    for step in _STEP.finditer(text):
        yield {name: value for name, value in step.groupdict().items() if value is not None}


def balance_of(accounts: Accounts, user_id: str) -> str:
    """A user's balance as the recipe writes it."""
    found = accounts.usage(user_id)
    (meter,) = [each for each in found.meters if each.meter == METER]
    buckets = f"{meter.used:,} of {meter.limit:,} used, rollover {meter.rollover:,}, purchased {meter.purchased:,}"
    return f"{user_id}: {found.plan}, {found.status}; {buckets}"


def spend(settings: Settings, user_id: str, amount: int) -> None:
    """Usage as a plain producer sends it; a client would date it by the clock of this host."""
    event = {"event_id": uuid4().hex, "user_id": user_id, "meter": METER, "quantity": amount}
    with Redis.from_url(settings.redis_url) as redis:
        redis.xadd(partition_of(settings, user_id).entries, {"v": "1", "e": json.dumps(event)})
    drain(settings, user_id)


def run_recipe(text: str, settings: Settings) -> list[str]:
    """Run the recipe; returns each balance that it shows otherwise than it is."""
    names: dict[str, Any] = {}
    wrong: list[str] = []
    with Accounts.connect(settings) as accounts:
        for step in steps_of(text):
            match step:
                case {"language": "python", "text": code}:
                    exec(compile(code, "docs/payment-webhooks.md", "exec"), names)
                case {"language": "text", "text": shown}:
                    found = [balance_of(accounts, line.partition(":")[0]) for line in shown.splitlines()]
                    if "\n".join([*found, ""]) != shown:
                        wrong.append(f"{shown} is {found}")
                case {"now": now}:
                    move_clock(settings, datetime.fromisoformat(now) - datetime.now(UTC))
                case {"spender": user_id, "amount": amount}:
                    spend(settings, user_id, int(amount))
                case _:
                    raise AssertionError(f"nothing runs a block like {step}")
    return wrong


@pytest.fixture(autouse=True)
def _as_in_the_wheel(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "meterfall", public)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))


def test_the_recipe_does_what_it_says(settings: Settings) -> None:
    assert run_recipe(RECIPE, settings) == []
    with worker_resources(settings) as resources:
        assert verify_ledger(resources).differences == []


def test_every_change_of_the_recipe_shows_its_balance() -> None:
    languages = [step["language"] for step in steps_of(RECIPE) if "language" in step]
    assert languages.count("text") >= 20
    changes = re.compile(r"accounts\.(open|renew|grant|claw_back|change_plan|set_status|set_period)\(")
    shown = iter([*languages, ""])
    next(shown)
    for step in (step for step in steps_of(RECIPE) if "language" in step):
        following = next(shown)
        if step["language"] == "python" and changes.search(step["text"]) and "respond(" not in step["text"]:
            assert following == "text", step["text"]


def test_a_recipe_that_promises_something_else_is_found(settings: Settings) -> None:
    lied = RECIPE.replace("rollover 60,000", "rollover 60,001", 1)
    assert lied != RECIPE
    (wrong,) = run_recipe(lied, settings)
    assert wrong.startswith("user-42: basic, active; 0 of 100,000 used, rollover 60,001, purchased 0\n is ")
    with pytest.raises(AssertionError):
        run_recipe("```python\nassert 1 == 2\n```\n", settings)
    with pytest.raises(AssertionError, match="nothing runs"):
        run_recipe("```console\n$ meterfall plans\n```\n", settings)
