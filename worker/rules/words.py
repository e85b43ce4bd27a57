"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return a number with its noun: `1 account`, `2,000 accounts`, `2 stream entries`, `3 processes`."""
    if number == 1:
        return f"1 {thing}"
    if thing.endswith("ss"):
        return f"{number:,} {thing}es"
    return f"{number:,} {thing.removesuffix('y')}ies" if thing.endswith("y") else f"{number:,} {thing}s"
