"""The connections behind `Accounts`: claimed before their first use, closed once, left to the parent of a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from threading import Lock
from weakref import WeakSet

import psycopg
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings
from worker.client.effects import as_down
from worker.errors import BillingError, ClientClosed, LedgerUnavailable, RedisUnavailable
from worker.ledger.connection import LedgerError
from worker.resources import Resources, Review


class Connections:
    """The resources of one process, lent to one call after the other. Threads may share them."""

    def __init__(self, settings: Settings) -> None:
        """Connect to no server yet. Raises CatalogueError, and LedgerUnavailable if DATABASE_URL is unset."""
        try:
            self._resources = Resources.open(settings)
        except LedgerError as error:
            raise LedgerUnavailable(str(error)) from error
        self.review: Review | None = None
        self._claiming = Lock()
        self._is_claimed = False
        self._is_closed = False
        _opened.add(self)

    @contextmanager
    def lend(self) -> Iterator[Resources]:
        """Lend the resources to one call; raise the errors of the servers as public ones."""
        if self._is_closed:
            raise ClientClosed
        try:
            self._claim()
            yield self._resources if self.review is None else self._resources.reviewed(self.review)
        except RedisError as error:
            found = as_down(error)
            raise found if isinstance(found, BillingError) else RedisUnavailable(str(error)) from error
        except (LedgerError, psycopg.Error, SQLAlchemyError) as error:
            raise LedgerUnavailable(str(error).strip()) from error

    def reviewed(self, review: Review) -> Connections:
        """Return the same connections for calls whose changes `review` sees first. Close the original only."""
        other = copy(self)
        other.review = review
        return other

    def _claim(self) -> None:
        """Agree with both servers on the number of partitions, once; ask for the catalogue in force once in a while."""
        with self._claiming:
            if not self._is_claimed:
                self._resources.claim()
                self._is_claimed = True
            elif self._resources.in_force.is_older_than(_CATALOGUE_SECONDS):
                self._resources.take_up_catalogues()

    def begin_anew(self) -> None:
        """In a child after a fork: leave the connections to the parent, and open others."""
        self._resources.engine.dispose(close=False)
        self._claiming = Lock()

    def close(self) -> None:
        """Give the connections back."""
        self._is_closed = True
        self._resources.close()


# The age at which a long-lived process asks again which catalogue is in force.
_CATALOGUE_SECONDS = 10.0

_opened: WeakSet[Connections] = WeakSet()


def _after_fork() -> None:
    for each in list(_opened):
        each.begin_anew()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
