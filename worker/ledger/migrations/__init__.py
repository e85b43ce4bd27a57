"""Migrations of the ledger, run by `meterfall migrate`."""

from __future__ import annotations

from pathlib import Path


def newest_revision() -> str:
    """Name the revision of the tables that this code wants: `0005`, by the name of the newest file, m0005_….py."""
    names = sorted(path.stem for path in (Path(__file__).parent / "versions").glob("m*_*.py"))
    return names[-1].removeprefix("m").partition("_")[0]
