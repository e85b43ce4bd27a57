"""The one form of times, ages, numbers and memory for people. JSON has ISO times and plain numbers."""

from __future__ import annotations

from datetime import UTC, datetime

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
# Each unit with the age from which on it is used: 119 s is told better than 2 min.
_AGES = ((2 * _DAY, _DAY, "d"), (2 * _HOUR, _HOUR, "h"), (2 * _MINUTE, _MINUTE, "min"), (0, 1, "s"))


def moment(at: datetime) -> str:
    """Return a time for people, in UTC to the second: `2026-11-30 04:12:09 UTC`."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def grouped(number: float) -> str:
    """Return a number with its thousands grouped: `1,234,567`, `1,234.5`."""
    return f"{number:,}"


def age(seconds: float) -> str:
    """Return a length of time in one unit: `12 s`, `4 min`, `3 h`, `5 d`."""
    seconds = max(0.0, seconds)
    size, unit = next((size, unit) for least, size, unit in _AGES if seconds >= least)
    return f"{seconds / size:,.0f} {unit}"


def rate(per_second: float) -> str:
    """Return a rate: `0.4/s`, `1,234/s`."""
    return f"{per_second:,.0f}/s" if per_second >= 10 or per_second == 0 else f"{per_second:.1f}/s"


def memory(size_bytes: float) -> str:
    """Return an amount of memory: `512 KiB`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1_024:
            return f"{size_bytes:,.0f} {unit}"
        size_bytes /= 1_024
    return f"{size_bytes:,.1f} GiB"
