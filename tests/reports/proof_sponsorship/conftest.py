"""Settings and a client for the tests of the pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from config.settings import Settings
from tests.reports.proof_sponsorship.model import BUDGETS
from tests.support.resources import settings_for
from worker.client import Billing


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    """Small budgets, and a dead worker's marker that nobody has to wait for."""
    budgets = {f"sponsor_daily_units_{tier}": units for tier, units in BUDGETS.items()}
    return settings_for(emptied_database_url, redis_url, hand_grace_ms=1, default_plan="tenant", **budgets)


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    """A client."""
    with Billing.connect(settings) as client:
        yield client
