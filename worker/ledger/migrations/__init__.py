"""Migrations of the ledger, run by `meterfall migrate`."""

from __future__ import annotations

from pathlib import Path


def newest_revision() -> str:
    """Name the revision of the tables that this code wants, such as `0005`.

    The file of the newest migration has it in its name, m0005_pauses.py: neither alembic nor a server is needed.
    """
    names = sorted(path.stem for path in (Path(__file__).parent / "versions").glob("m*_*.py"))
    return names[-1].removeprefix("m").partition("_")[0]
