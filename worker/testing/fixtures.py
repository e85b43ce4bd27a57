"""Fixtures of pytest for host projects: `pytest_plugins = ["meterfall.testing.fixtures"]` in the root conftest.py.

`meterfall_billing`, `meterfall_async_billing`   fakes; both share their accounts and all that is recorded
`meterfall_servers`                              a PostgreSQL and a Valkey, emptied for each test
`meterfall_settings`                             fields of `Settings` for all of them: override it to name a catalogue
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from worker.testing.billing import AsyncFakeBilling, FakeBilling

if TYPE_CHECKING:
    from worker.testing.local import LocalPair, LocalServers


@pytest.fixture
def meterfall_settings() -> Mapping[str, Any]:
    """Fields of `Settings`, such as `catalogue_path`. None, unless a host overrides this fixture."""
    return {}


@pytest.fixture
def meterfall_billing(meterfall_settings: Mapping[str, Any]) -> Iterator[FakeBilling]:
    """A fake without accounts: `meterfall_billing.open("user-42", "basic")`."""
    with FakeBilling(**meterfall_settings) as billing:
        yield billing


@pytest.fixture
def meterfall_async_billing(meterfall_billing: FakeBilling) -> Iterator[AsyncFakeBilling]:
    """The same for asyncio, beside `meterfall_billing`."""
    billing = AsyncFakeBilling(beside=meterfall_billing)
    yield billing
    billing.end()


@pytest.fixture(scope="session")
def _meterfall_pair() -> Iterator[LocalPair]:
    # Imported here: it needs a Unix.
    from worker.testing.local import local_pair

    with local_pair() as pair:
        yield pair


@pytest.fixture
def meterfall_servers(
    _meterfall_pair: LocalPair, meterfall_settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalServers]:
    """An empty ledger and an empty Redis, which `DATABASE_URL` and `REDIS_URL` name for the length of the test.

    They have the tables, and no workers: `meterfall_servers.apply()` does their work. `Accounts` opens accounts.
    """
    with _meterfall_pair.emptied(meterfall_settings) as servers:
        for name, value in servers.environ.items():
            monkeypatch.setenv(name, value)
        yield servers
