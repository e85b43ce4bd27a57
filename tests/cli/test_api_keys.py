"""`meterfall api-keys`: a secret is shown once, and what is wrong is named."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tests.support.commands import Meterfall, assert_all_refused, assert_refused
from worker.admin.api_keys import Keyring
from worker.errors import ApiKeyRefused
from worker.resources import Resources


def test_a_key_is_shown_once_and_ends_when_it_is_revoked(meterfall: Meterfall, resources: Resources) -> None:
    said = meterfall.done("api-keys", "add", "jane", "--role", "support", "--expires", "2036-01-01T00:00:00Z")
    head, secret = said.splitlines()
    key_id = secret.split("_")[1]
    assert head == f"{key_id}: support jane until 2036-01-01T00:00:00+00:00; its key, which nothing shows again:"
    key = Keyring(resources).authenticate(secret, datetime.now(UTC))
    assert (key.key_id, key.name, key.role) == (key_id, "jane", "support")
    shown = [meterfall.done("api-keys", "list", *more) for more in ([], ["--all"])]
    shown += [str(meterfall.done("api-keys", "list", *more, "--json")) for more in ([], ["--all"])]
    shown.append(meterfall.done("api-keys", "revoke", "jane", "--by", "joe", "--reason", "leaked", "--yes"))
    assert shown[-1] == f"revoked {key_id}, jane\n"
    assert all(key_id in text and secret[16:] not in text for text in shown)
    with pytest.raises(ApiKeyRefused, match="was revoked"):
        Keyring(resources).authenticate(secret, datetime.now(UTC))
    assert meterfall.done("api-keys", "list") == "none\n"
    (row,) = meterfall.done("api-keys", "list", "--all", "--json")
    assert (row["state"], row["revoked_by"], row["revoked_reason"]) == ("revoked", "joe", "leaked")
    assert "joe" in meterfall.done("api-keys", "list", "--all")


def test_json_has_the_secret_and_the_key(meterfall: Meterfall, resources: Resources) -> None:
    added = meterfall.done("api-keys", "add", "tts", "--role", "producer", "--by", "joe", "--reason", "test", "--json")
    assert Keyring(resources).authenticate(added.pop("secret"), datetime.now(UTC)).key_id == added["key_id"]
    assert (added["name"], added["role"], added["created_by"], added["reason"]) == ("tts", "producer", "joe", "test")
    (row,) = meterfall.done("api-keys", "list", "--json")
    assert row == {**added, "state": "in force"}


def test_what_is_wrong_is_named(meterfall: Meterfall) -> None:
    meterfall.done("api-keys", "add", "taken", "--role", "reader")
    add = ["api-keys", "add"]
    assert_all_refused(
        meterfall,
        [
            ([*add, "tts"], {}, ["--role"]),
            ([*add, "tts", "--role", "admin"], {}, ["--role", "'producer', 'reader', 'support', 'operator'"]),
            ([*add, "", "--role", "reader"], {}, ["name: must be 1 to 256 printable characters"]),
            ([*add, "0123456789ab", "--role", "reader"], {}, ["name: must", "'0123456789ab'"]),
            ([*add, "taken", "--role", "operator"], {}, ["name: another key is called 'taken'; revoke that one first"]),
            ([*add, "tts", "--role", "reader", "--by", ""], {}, ["actor: must be"]),
            ([*add, "tts", "--role", "reader", "--reason", "\n"], {}, ["reason: must be"]),
            ([*add, "tts", "--role", "reader", "--expires", "tomorrow"], {}, ["--expires: 'tomorrow' is no ISO 8601"]),
            ([*add, "tts", "--role", "reader", "--expires", "2036-01-01"], {}, ["--expires: '2036-01-01'", "offset"]),
            ([*add, "tts", "--role", "reader", "--expires", "2020-01-01T00:00:00Z"], {}, ["expires_at: must be after"]),
            (["api-keys", "revoke", "nobody", "--yes"], {}, ["key: no key 'nobody'; `meterfall api-keys list`"]),
            (["api-keys", "revoke", "taken"], {}, ["its caller gets no answer any more; nothing was done. Say --yes"]),
            (["api-keys", "list", "--limit", "0"], {}, ["--limit"]),
        ],
    )
    (row,) = meterfall.done("api-keys", "list", "--json", "--all")
    assert (row["name"], row["state"]) == ("taken", "in force")


def test_keys_are_made_while_redis_is_away(meterfall: Meterfall) -> None:
    meterfall.environment["REDIS_URL"] = "redis://127.0.0.1:1/0"
    meterfall.done("api-keys", "add", "tts", "--role", "producer")
    meterfall.done("api-keys", "revoke", "tts", "--yes")
    meterfall.environment["DATABASE_URL"] = "postgresql://u@127.0.0.1:1/d"
    assert_refused(meterfall("api-keys", "list"), 1, "DATABASE_URL", "does not answer")
