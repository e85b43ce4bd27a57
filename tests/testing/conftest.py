"""The subjects: both fakes, and both real clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.testing.subjects import Fake, Real, Subject
from worker.demo.servers import Server

# Only a real client asks for the fixtures by which conftest.py marks tests.
REAL = [pytest.param(f"real {kind}", marks=pytest.mark.servers) for kind in ("blocking", "asyncio")]


@pytest.fixture(params=["fake blocking", "fake asyncio", *REAL])
def make_subject(request: pytest.FixtureRequest) -> Iterator[Callable[..., Subject]]:
    """Make a subject under settings that differ from the usual ones as named."""
    world, _, kind = request.param.partition(" ")
    with ExitStack() as stack:

        def make(**overrides: object) -> Any:
            if world == "fake":
                return stack.enter_context(closing(Fake(kind, overrides)))
            server: Server = request.getfixturevalue("own_redis")
            url = request.getfixturevalue("emptied_database_url")
            return stack.enter_context(closing(Real(kind, url, server, overrides)))

        yield make


@pytest.fixture
def subject(make_subject: Callable[..., Subject]) -> Subject:
    """A subject under the usual settings; `u1` is on the plan `tenant` with 1,000 credits."""
    made = make_subject()
    made.open("u1")
    return made
