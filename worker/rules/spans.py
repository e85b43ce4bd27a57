"""Spans of whole days in UTC, and their parts by month. Pure."""

from __future__ import annotations

from datetime import date, timedelta
from typing import NamedTuple


class Span(NamedTuple):
    """The days from `since` up to, and without, `until`."""

    since: date
    until: date


class MonthPart(NamedTuple):
    """The days `first` to `last`, both counted, of the month that begins at `month`."""

    month: date
    first: int
    last: int


def month_of(day: date) -> Span:
    """Return the calendar month that holds `day`."""
    first = day.replace(day=1)
    return Span(first, (first + timedelta(days=31)).replace(day=1))


def parts_by_month(span: Span) -> list[MonthPart]:
    """Return the parts of a span, one for each month, in order; none for an empty span."""
    parts = []
    since = span.since
    while since < span.until:
        month = month_of(since)
        until = min(month.until, span.until)
        parts.append(MonthPart(month.since, since.day, (until - timedelta(days=1)).day))
        since = until
    return parts
