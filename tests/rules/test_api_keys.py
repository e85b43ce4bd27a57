"""API keys: what roles may do, how secrets look, and which key is good."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta

import pytest

from schemas.codes import KeyRefusal, Role
from worker.errors import ApiKeyRefused
from worker.rules import api_keys
from worker.rules.api_keys import (
    RIGHTS,
    ApiKey,
    KnownKey,
    Right,
    digest_of,
    judge,
    key_id_in,
    require_right,
    secret_of,
)

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
KEY = ApiKey("0123456789ab", "tts", Role.PRODUCER, NOW, "jane", None, NOW + timedelta(days=1))
SECRET = secret_of(KEY.key_id, bytes(range(32)))
KNOWN = KnownKey(KEY, digest_of(SECRET))
OTHER = secret_of(KEY.key_id, bytes(32))


def refusal(known: KnownKey | None, secret: str, now: datetime = NOW) -> ApiKeyRefused:
    with pytest.raises(ApiKeyRefused) as refused:
        judge(known, secret, now)
    return refused.value


def test_a_secret_has_a_beginning_that_scanners_find_and_the_id_of_its_key() -> None:
    assert SECRET == "mf_0123456789ab_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert len(SECRET) == 59
    assert key_id_in(SECRET) == KEY.key_id
    assert len(digest_of(SECRET)) == 32


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("", KeyRefusal.MISSING),
        ("hunter2", KeyRefusal.MALFORMED),
        (SECRET[:-1], KeyRefusal.MALFORMED),
        (SECRET + "A", KeyRefusal.MALFORMED),
        (SECRET + "\n", KeyRefusal.MALFORMED),
        (" " + SECRET, KeyRefusal.MALFORMED),
        (SECRET.upper(), KeyRefusal.MALFORMED),
        (SECRET.replace("0123456789ab", "٠123456789ab"), KeyRefusal.MALFORMED),
        (SECRET.replace("AA", "é="), KeyRefusal.MALFORMED),
        ("mf_\ud800", KeyRefusal.MALFORMED),
    ],
    ids=ascii,
)
def test_what_is_no_secret_is_told_so_and_not_quoted(secret: str, reason: KeyRefusal) -> None:
    with pytest.raises(ApiKeyRefused) as refused:
        key_id_in(secret)
    assert refused.value.reason == reason
    assert not secret or secret not in str(refused.value)


def test_a_right_secret_is_good_until_its_end_or_its_revocation() -> None:
    assert judge(KNOWN, SECRET, NOW) == KEY
    assert judge(KnownKey(KEY._replace(expires_at=None), KNOWN.digest), SECRET, NOW + timedelta(days=9_999))
    last = NOW + timedelta(days=1) - timedelta(microseconds=1)
    assert judge(KNOWN, SECRET, last).state_at(last) == "in force"
    expired = refusal(KNOWN, SECRET, NOW + timedelta(days=1))
    assert (expired.reason, expired.key_id) == (KeyRefusal.EXPIRED, KEY.key_id)
    revoked = refusal(KnownKey(KEY._replace(revoked_at=NOW), KNOWN.digest), SECRET)
    assert (revoked.reason, str(revoked)) == (KeyRefusal.REVOKED, "API key: 0123456789ab was revoked")


def test_who_has_no_right_secret_learns_nothing_of_the_key() -> None:
    over = KnownKey(KEY._replace(revoked_at=NOW, expires_at=NOW), KNOWN.digest)
    refused = [refusal(None, SECRET), refusal(KNOWN, OTHER), refusal(over, OTHER), refusal(None, OTHER)]
    assert {(each.reason, str(each), each.key_id) for each in refused} == {
        (KeyRefusal.UNKNOWN, "API key: there is no such key", None)
    }


def test_an_unknown_key_costs_the_same_calls_as_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        calls.append(("compare", len(left) * len(right)))
        return hmac.compare_digest(left, right)

    def digest(secret: str) -> bytes:
        calls.append(("digest", len(secret)))
        return digest_of(secret)

    monkeypatch.setattr(api_keys, "compare_digest", compare)
    monkeypatch.setattr(api_keys, "digest_of", digest)
    refusal(KNOWN, OTHER)
    of_a_wrong_secret = list(calls)
    calls.clear()
    refusal(None, OTHER)
    assert calls == of_a_wrong_secret == [("digest", 59), ("compare", 32 * 32)]


# ---------------------------------------------------------------------------------------------------------------------
# Roles


def test_each_role_may_what_its_people_need_and_nothing_else() -> None:
    def may(role: Role) -> set[str]:
        return {right.value for right in RIGHTS[role]}

    assert may(Role.PRODUCER) == {"emit", "check", "hold", "charge", "sponsor"}
    reads = {"read_accounts", "read_usage", "read_reports", "read_notices", "read_status"}
    assert may(Role.READER) == reads
    assert may(Role.SUPPORT) - reads == {
        "grant", "claw_back", "reverse", "change_plan", "set_status", "set_limit", "forgive_debt", "release_hold",
        "sign_in",
    }  # fmt: skip
    assert may(Role.SUPPORT) > reads
    assert may(Role.OPERATOR) == {right.value for right in Right}
    assert RIGHTS.keys() == set(Role)


def test_a_role_without_the_right_is_told_which_roles_have_it() -> None:
    require_right(KEY, Right.EMIT)
    with pytest.raises(ApiKeyRefused) as refused:
        require_right(KEY, Right.GRANT)
    assert (refused.value.reason, refused.value.key_id) == (KeyRefusal.WRONG_ROLE, KEY.key_id)
    assert str(refused.value) == "API key: 0123456789ab has the role producer, this needs support, operator"
