"""Sessions: only our own cookies count, until their end; only forms of their own pages come through."""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta

import pytest

from worker.rules.sessions import Session, cookie_of, form_token, is_form_token, session_in

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
SECRET, OTHER = bytes(range(32)), bytes(32)
SESSION = Session("0123456789ab", "0123456789abcdef" * 2, NOW + timedelta(hours=8))
COOKIE = cookie_of(SESSION, SECRET)


def test_a_cookie_is_its_session_until_the_end() -> None:
    assert session_in(COOKIE, SECRET, NOW) == SESSION
    assert session_in(COOKIE, SECRET, SESSION.ends_at - timedelta(microseconds=1)) == SESSION
    assert session_in(COOKIE, SECRET, SESSION.ends_at) is None
    # An end between two seconds is the earlier one.
    late = SESSION._replace(ends_at=SESSION.ends_at + timedelta(microseconds=999_999))
    assert session_in(cookie_of(late, SECRET), SECRET, NOW) == SESSION
    # A browser takes it as it is: no character needs quotes, and 4,096 bytes are the most that all of them take.
    assert set(COOKIE) <= set(string.ascii_letters + string.digits + "-_.")
    assert len(COOKIE) < 128


def test_another_secret_ends_all_sessions() -> None:
    assert session_in(COOKIE, OTHER, NOW) is None


def test_no_character_of_a_cookie_can_be_changed() -> None:
    changed = [COOKIE[:at] + ("1" if COOKIE[at] != "1" else "2") + COOKIE[at + 1 :] for at in range(len(COOKIE))]
    assert [each for each in changed if session_in(each, SECRET, NOW) is not None] == []


@pytest.mark.parametrize(
    "cookie",
    [
        "", ".", "...", COOKIE + "A", COOKIE + "\n", " " + COOKIE, COOKIE.upper(), COOKIE.rpartition(".")[0],
        f"0123456789ab.{SESSION.number}.9999999999999." + "A" * 43, "\ud800", "é" * 100, "x" * 100_000,
        cookie_of(SESSION._replace(key_id="0123456789ab.1"), SECRET),
        f"{SESSION.key_id}.{SESSION.number}.{int(SESSION.ends_at.timestamp())}.{form_token(SESSION, SECRET)}",
    ],
    ids=lambda cookie: ascii(cookie)[:20],
)  # fmt: skip
def test_what_is_no_cookie_of_ours_is_no_session(cookie: str) -> None:
    assert session_in(cookie, SECRET, NOW) is None


def test_a_form_comes_through_with_the_token_of_its_session_alone() -> None:
    token = form_token(SESSION, SECRET)
    assert is_form_token(token, SESSION, SECRET)
    assert is_form_token(token, SESSION._replace(ends_at=NOW), SECRET)  # a session that is renewed keeps its forms
    assert not is_form_token(token, SESSION._replace(number="f" * 32), SECRET)
    assert not is_form_token(token, SESSION, OTHER)
    for wrong in ("", token[:-1], token + "A", "é", "\ud800", COOKIE, COOKIE.rpartition(".")[2]):
        assert not is_form_token(wrong, SESSION, SECRET)


def test_a_short_secret_is_refused() -> None:
    for call in (
        lambda: cookie_of(SESSION, bytes(31)),
        lambda: session_in(COOKIE, b"", NOW),
        lambda: is_form_token("", SESSION, b"secret"),
    ):
        with pytest.raises(ValueError, match=r"^secret: must be at least 32 bytes"):
            call()
