"""Migrations of the ledger, run by `meterfall migrate`."""

from __future__ import annotations

from pathlib import Path

# Alembic's default name is other programs' also.
VERSION_TABLE = "meterfall_version"


def newest_revision() -> str:
    """Return the revision of the tables that this code wants, such as `0005`.

    It is in the name of the newest migration's file, m0005_pauses.py, so this needs neither alembic nor a server.
    """
    names = sorted(path.stem for path in (Path(__file__).parent / "versions").glob("m*_*.py"))
    return names[-1].removeprefix("m").partition("_")[0]
