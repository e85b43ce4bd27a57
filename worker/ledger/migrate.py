"""Bring the schema to a revision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import psycopg
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from worker.ledger.connection import LOCK_SPACE, LedgerError

MIGRATION_LOCK_SPACE = LOCK_SPACE + 1


# Longest time that a waiting migration blocks workers, and the time that it then gives them.
_MIGRATION_LOCK_TIMEOUT_MS = 500


_MIGRATION_PAUSE_SECONDS = 1.0


def migrate(database_url: str, revision: str = "head", patience_seconds: float = 60) -> None:
    """Bring the schema at `database_url` to `revision` ("head", "base", or a number), forward or back.

    Each migration is one transaction; after a kill in between, the next call goes on from there. It waits for a table
    in use only for a moment at a time: later users of the table wait for its lock also, and a backup may take hours.
    Raises LedgerError for a revision that does not exist, and if a table is still in use after `patience_seconds`.
    """
    # Imported here: it takes a sixth of a worker's start, and only migrations need it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    # One at a time: a platform may start several dynos at once. The lock is the session's, so it ends with it.
    with engine.connect() as connection, engine.connect() as guard:
        guard.execute(text("SELECT pg_advisory_lock(:space, 0)"), {"space": MIGRATION_LOCK_SPACE})
        current = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar()
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if current else None
        connection.execute(text(f"SET lock_timeout = {_MIGRATION_LOCK_TIMEOUT_MS}"))
        connection.commit()
        config.attributes["connection"] = connection
        back = revision == "base" or (version is not None and revision.isdigit() and revision < version)
        run = command.downgrade if back else command.upgrade
        try:
            _once_not_in_use(connection, patience_seconds, lambda: run(config, revision))
        except CommandError:
            known = ", ".join(
                reversed([script.revision for script in ScriptDirectory.from_config(config).walk_revisions()])
            )
            raise LedgerError(f"revision: unknown {revision!r}; there are base, head, {known}") from None


def _once_not_in_use(connection: Connection, patience_seconds: float, run: Callable[[], None]) -> None:
    """Run migrations and commit; retry while one of their tables is in use. See `migrate`."""
    give_up_at = monotonic() + patience_seconds
    while True:
        try:
            run()
            connection.commit()
        except OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            if monotonic() >= give_up_at:
                raise LedgerError(
                    f"a table has been in use for {patience_seconds:g} s, by a backup or a long query; the schema is "
                    "as the last finished migration left it, and a repeat goes on from there"
                ) from None
            connection.rollback()
            sleep(_MIGRATION_PAUSE_SECONDS)
        else:
            return
