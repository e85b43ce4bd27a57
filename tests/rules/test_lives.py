"""Which life a Redis is in, by its token and those of the ledger."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from worker.rules.lives import Found, Life, found_as, text_of, token_of

FIRST, SECOND, OTHER = "1" * 32, "2" * 32, "f" * 32


@pytest.mark.parametrize(
    ("token", "known", "found"),
    [
        (None, [], "new"),
        (OTHER, [], "new"),
        (FIRST, [FIRST], None),
        (SECOND, [SECOND, FIRST], None),
        (None, [FIRST], "empty"),
        (FIRST, [SECOND, FIRST], "older"),
        (OTHER, [SECOND, FIRST], "unknown"),
    ],
)
def test_a_token_tells_what_a_redis_is_to_the_ledger(token: str | None, known: list[str], found: Found | None) -> None:
    assert found_as(token, known) == found


def test_only_a_token_of_ours_counts() -> None:
    assert token_of(FIRST.encode()) == FIRST
    for raw in (None, b"", b"1", b"x" * 32, FIRST.encode() + b"\n", b"\xff" * 32):
        assert token_of(raw) is None


def test_a_loss_is_open_until_it_is_acknowledged() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert not Life(FIRST, now, "new").is_open
    assert Life(FIRST, now, "empty").is_open
    assert not Life(FIRST, now, "empty", now, "jane", "sent again").is_open
    assert text_of(now, "empty").startswith("Redis was found empty at 2026-01-02 03:04:05 UTC: ")
    assert "old copy" in text_of(now, "older")
    assert "unknown to the ledger" in text_of(now, "unknown")
