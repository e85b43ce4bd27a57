"""Kinds of SQL error: caused by an event's data, transient, or for an operator."""

from __future__ import annotations

from enum import Enum, auto

import psycopg


class ErrorKind(Enum):
    """The kind of an error, which decides what a drain does."""

    TRANSIENT = auto()  # retry the batch on a new connection
    DATA = auto()  # Postgres refuses some event's data: find the event
    UNIQUE = auto()  # a race or an event's data: retry once, then find it
    OTHER = auto()  # stop the partition, lose nothing


# Connection lost (08), rollback and deadlock (40), resources (without 53: a full disk is not transient),
# lock not available (55P03), cancelled or timed out (57014, 57P0x, 25P0x).
_TRANSIENT_CLASSES = ("08", "40")
_TRANSIENT_STATES = frozenset({"55P03", "57014", "57P01", "57P02", "57P03", "57P05", "25P03", "53300"})


def kind_of(error: psycopg.Error) -> ErrorKind:
    """Return the kind of `error` by its SQLSTATE; without one the connection broke."""
    state = error.sqlstate
    if state is None:
        return ErrorKind.TRANSIENT if isinstance(error, psycopg.OperationalError) else ErrorKind.OTHER
    if state == "23505":
        return ErrorKind.UNIQUE
    if state.startswith(("22", "23")):
        return ErrorKind.DATA
    if state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES:
        return ErrorKind.TRANSIENT
    return ErrorKind.OTHER
