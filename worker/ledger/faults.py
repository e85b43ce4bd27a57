"""Faults of the configuration that Postgres names, each in one line: waiting mends none of them.

A server that starts, stops or has no connection left is no such fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import psycopg
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings, without_secrets
from worker.ledger.connection import LedgerError, Postgres, batch_connection, open_engine
from worker.ledger.revision import check_revision

T = TypeVar("T")

# libpq gives no code for what it was told while it connected, only the text of the server or of the pooler.
_PASSING = re.compile(
    r"the database system is|too many (clients|connections)|connection slots|no more connections|terminating connection"
    r"|server login has been failing|cannot connect to server|query_wait_timeout|client_login_timeout"
    r"|shut(ting)? ?down|pgbouncer database is disabled|server conn crashed",
    re.IGNORECASE,
)
_NO_LOGIN = re.compile(
    r"fe_sendauth|certificate|does not support SSL|SSL connection is required|sslmode"
    r"|invalid (connection option|integer value|port number|\w+ value)",
    re.IGNORECASE,
)
INSUFFICIENT_PRIVILEGE = "42501"
_UNFIT = ("42P01", "42703", "42883", "3F000")
_DENIED = re.compile(r"permission denied for (?:table|view|relation|sequence|column) \"?(\w+)")
_PHRASES = {"SELECT": "SELECT from", "INSERT": "INSERT into", "UPDATE": "UPDATE", "DELETE": "DELETE from"}

# Columns that the role may and this login may not, by verb; none if the login lacks all of them. DELETE has no columns.
_LACKED = """
    SELECT verb, CASE WHEN bool_or(ours) THEN string_agg(attname, ', ' ORDER BY attnum) FILTER (WHERE NOT ours) END
    FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) WITH ORDINALITY AS asked (verb, number),
        pg_attribute,
        LATERAL (SELECT CASE verb WHEN 'DELETE' THEN has_table_privilege(%(table)s, verb)
            ELSE has_column_privilege(%(table)s, attnum, verb) END) AS mine (ours),
        LATERAL (SELECT CASE WHEN to_regrole(%(role)s) IS NULL THEN true
            WHEN verb = 'DELETE' THEN has_table_privilege(to_regrole(%(role)s)::oid, %(table)s, verb)
            ELSE has_column_privilege(to_regrole(%(role)s)::oid, %(table)s, attnum, verb) END) AS role (theirs)
    WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped AND theirs
    GROUP BY verb, number HAVING NOT bool_and(ours) ORDER BY number
"""
_IS_MEMBER = "SELECT to_regrole(%(role)s) IS NOT NULL AND pg_has_role(to_regrole(%(role)s)::oid, 'USAGE')"


def fault_of(error: BaseException, settings: Settings, *, command: str = "", role: str = "") -> str | None:
    """Return the fault of the configuration that `error` is, in one line; None if it is an outage, or none of this.

    `command` and the `role` that it needs are named where a right is missing. That and tables of another revision take
    a look at the server.
    """
    inner = getattr(error, "orig", None) or error
    if not isinstance(inner, psycopg.Error):
        return None
    if inner.sqlstate is None:
        return _fault_of_login(inner, settings)
    if inner.sqlstate == INSUFFICIENT_PRIVILEGE:
        return _missing_right(inner, settings, command, role)
    if inner.sqlstate in _UNFIT:
        return _wrong_revision(inner, settings)
    return None


def require_rights(engine: Engine) -> None:
    """Raise LedgerError unless this login may apply events: a dyno that may not would halt each partition."""
    with batch_connection(engine) as postgres:
        login, may = postgres.execute("SELECT current_user, has_table_privilege('usage_log', 'INSERT')").fetchall()[0]
    if not may:
        raise LedgerError(
            f"DATABASE_URL: login `{login}` may not INSERT into usage_log: `meterfall worker run` needs the role "
            "meterfall_worker"
        )


def _fault_of_login(error: psycopg.Error, settings: Settings) -> str | None:
    """Explain why a server let nobody in."""
    text = " ".join(str(error).split())
    refused = re.search(r"(?:FATAL|ERROR):\s+(.*)", text)
    if (
        not isinstance(error, psycopg.OperationalError | psycopg.ProgrammingError)
        or _PASSING.search(text)
        or not (refused or _NO_LOGIN.search(text))
    ):
        return None
    reason = refused[1] if refused else text
    if "startup parameter" in reason:
        return f"DATABASE_URL: a pooler refuses our options ({reason}): set METERFALL_DATABASE_POOLED=true"
    return f"DATABASE_URL: {without_secrets(settings.database_url or '')} refuses us: {reason}"


class _Rights(NamedTuple):
    """What a login lacks of the rights of a role on a table, in words; and whether it has the role."""

    login: str
    lacked: list[str]
    has_role: bool


def _missing_right(error: psycopg.Error, settings: Settings, command: str, role: str) -> str:
    """Say which login lacks which right, as far as the server tells."""
    said = error.diag.message_primary or "permission denied"
    login = make_url(settings.database_url or "postgresql://").username or "of this process"
    what = f"lacks a right ({said})"
    needs = f": `meterfall {command}` needs the role {role}" if command and role else ""
    if role and (denied := _DENIED.search(said)):
        found = _ask(settings, lambda postgres: _rights(postgres, denied[1], role))
        if found is not None:
            login = found.login
        if found is not None and found.lacked:
            what = f"may not {', '.join(found.lacked)} {denied[1]}"
        elif found is not None and found.has_role:
            needs = f", and so does its role {role}: `meterfall migrate --roles` grants what this release needs"
    return f"DATABASE_URL: login `{login}` {what}{needs}"


def _rights(postgres: Postgres, table: str, role: str) -> _Rights:
    names = {"table": table, "role": role}
    ((login, has_role),) = postgres.execute(f"SELECT current_user, ({_IS_MEMBER})", names).fetchall()
    lacked = [
        _PHRASES[verb].replace(verb, f"{verb} ({columns})" if columns else verb)
        for verb, columns in postgres.execute(_LACKED, names).fetchall()
    ]
    return _Rights(login, lacked, has_role)


def _wrong_revision(error: psycopg.Error, settings: Settings) -> str:
    """Say what revision the tables have."""

    def look(postgres: Postgres) -> str:
        try:
            check_revision(postgres)
        except LedgerError as found:
            return str(found)
        return ""

    found = _ask(settings, look)
    return (
        found
        or f"DATABASE_URL: the tables do not fit this release ({error.diag.message_primary}): run `meterfall migrate`"
    )


def _ask(settings: Settings, question: Callable[[Postgres], T]) -> T | None:
    """Ask the server over a connection of its own; None if it does not answer."""
    try:
        engine = open_engine(settings)
    except LedgerError:
        return None
    try:
        with batch_connection(engine) as postgres:
            return question(postgres)
    except (psycopg.Error, SQLAlchemyError, LedgerError):
        return None
    finally:
        engine.dispose()
