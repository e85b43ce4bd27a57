"""The schema at a glance, `worker.ledger.tables`, is the schema that the migrations make.

Alembic's own table is left out, and so are triggers and functions: the metadata has none.
"""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from worker.ledger.migrations.versions.m0023_grants import GRANTS_FIT
from worker.ledger.tables import SCHEMA

# What Postgres says of each table of the ledger. The order of columns counts; their numbers do not, since a column that
# was dropped leaves its number unused.
OURS = "relnamespace = 'public'::regnamespace AND relname <> 'meterfall_version'"
CATALOGUE = {
    "tables": f"""
        SELECT relname, relkind, relpersistence, reloptions
        FROM pg_class WHERE relkind IN ('r', 'p') AND {OURS}
    """,
    "columns": f"""
        SELECT relname, rank() OVER (PARTITION BY relname ORDER BY attnum), attname, format_type(atttypid, atttypmod),
            attnotnull, attidentity, attgenerated, attcollation::regcollation::text, pg_get_expr(adbin, adrelid)
        FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
        LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
        WHERE relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped AND {OURS}
    """,
    "constraints": f"""
        SELECT relname, conname, contype, convalidated, pg_get_constraintdef(pg_constraint.oid)
        FROM pg_class JOIN pg_constraint ON conrelid = pg_class.oid WHERE contype <> 't' AND {OURS}
    """,
    "indexes": f"""
        SELECT relname, pg_get_indexdef(indexrelid), indisvalid
        FROM pg_class JOIN pg_index ON indrelid = pg_class.oid WHERE {OURS}
    """,
}


def described(database_url: str, what: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database_url) as connection:
        return connection.execute(f"{CATALOGUE[what]} ORDER BY 1, 2".encode()).fetchall()


@pytest.fixture
def created_url(database_url: str) -> str:
    """URL of a database with nothing but the tables of `worker.ledger.tables`."""
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        connection.execute(GRANTS_FIT.encode())  # a constraint calls it
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    SCHEMA.create_all(engine)
    return database_url


def test_the_migrations_make_the_tables_at_a_glance(created_url: str, emptied_database_url: str) -> None:
    for what in CATALOGUE:
        migrated = described(emptied_database_url, what)
        assert described(created_url, what) == migrated, what
        assert {row[0] for row in migrated} == set(SCHEMA.tables), what
