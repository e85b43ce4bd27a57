"""The time in the id of a stream entry. Pure.

Redis writes it, by its clock. A producer may also choose an id of its own, and later ids then follow that one. So the
time of an entry ahead of the ledger's clock says nothing: the clock counts.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

# The clocks of Redis and Postgres may differ: an entry so little ahead came in when its id says.
CLOCK_SKEW_MS = 1_000

# For an entry's time where no clock is known: far enough from the end of dates for every setting.
END_OF_TIME = datetime(9000, 1, 1, tzinfo=UTC)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_CLOCK_SKEW = timedelta(milliseconds=CLOCK_SKEW_MS)
_LAST_MILLISECOND = (END_OF_TIME - _EPOCH) // _MILLISECOND


def milliseconds_of(entry_id: str) -> int:
    """Return the milliseconds since the epoch in the id of a stream entry. They may be beyond any date."""
    return int(entry_id.partition("-")[0])


def milliseconds_at(moment: datetime) -> int:
    """Return a moment as milliseconds since the epoch, rounded down."""
    return (moment - _EPOCH) // _MILLISECOND


def entered_at(entry_id: str, now: datetime) -> datetime:
    """Return when a stream entry came in: the time in its id, `now` if that is ahead."""
    milliseconds = milliseconds_of(entry_id)
    if milliseconds > _LAST_MILLISECOND:
        return now
    moment = datetime.fromtimestamp(milliseconds / 1_000, UTC)
    return moment if moment - now <= _CLOCK_SKEW else now


def stream_time(entry_id: str, now: datetime) -> datetime:
    """Return the moment at which an event is applied: when its entry came in, by `now` at the latest."""
    return min(entered_at(entry_id, now), now)


def is_ahead(entry_id: str, now: datetime) -> bool:
    """Return True if the time in the id of a stream entry is later than `now`, and by more than clocks differ."""
    return milliseconds_of(entry_id) > milliseconds_at(now) + CLOCK_SKEW_MS
