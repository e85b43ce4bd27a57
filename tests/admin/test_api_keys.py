"""API keys on a real ledger: made, revoked and recognised, by several processes and while Postgres is away."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import psycopg
import pytest

from config.settings import Settings
from schemas.codes import KeyRefusal, Role
from tests.support.ledger import empty_ledger, execute, rows, stop_clock
from tests.support.processes import killed_in
from tests.support.resources import settings_for, worker_resources
from tests.support.waiting import wait_until
from worker.admin import api_keys
from worker.admin.api_keys import Added, Keyring, add, listed, revoke
from worker.admin.change import MAX_CAUSE
from worker.demo.servers import Server, find_postgres, postgres_server
from worker.errors import AccountError, ApiKeyRefused, LedgerUnavailable
from worker.ledger import api_keys as ledger_keys
from worker.ledger.connection import Postgres
from worker.ledger.migrate import migrate
from worker.resources import Resources
from worker.rules.account import Cause
from worker.rules.api_keys import KnownKey, secret_of

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)


class Clock:
    """The clock of a keyring, which a test moves."""

    seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reads of keys from Postgres that keyrings make, each as the number of keys that it found."""
    found: list[int] = []
    read_known = ledger_keys.read_known

    def read(postgres: Postgres, limit: int) -> list[KnownKey]:
        known = read_known(postgres, limit)
        found.append(len(known))
        return known

    monkeypatch.setattr(ledger_keys, "read_known", read)
    return found


def tts(resources: Resources, **named: Any) -> Added:
    return add(resources, "tts", Role.PRODUCER, **{"actor": "jane"} | named)


def refused(keyring: Keyring, secret: str, now: datetime | None = None) -> KeyRefusal:
    """The reason with which a keyring refuses a secret."""
    with pytest.raises(ApiKeyRefused) as error:
        keyring.authenticate(secret, now or datetime.now(UTC))
    assert secret not in str(error.value)
    return error.value.reason


# ---------------------------------------------------------------------------------------------------------------------
# Made and revoked


def test_a_key_is_made_listed_recognised_and_revoked(settings: Settings, resources: Resources) -> None:
    stop_clock(settings, NOW)
    end = NOW + timedelta(days=30)
    added = tts(resources, expires_at=end, reason="new region")
    key = added.key
    assert (key.name, key.role, key.created_at, key.created_by, key.reason, key.expires_at, key.revoked_at) == (
        "tts", Role.PRODUCER, NOW, "jane", "new region", end, None,
    )  # fmt: skip
    assert added.secret.startswith(f"mf_{key.key_id}_")
    assert Keyring(resources).authenticate(added.secret, NOW) == key
    assert listed(resources) == (NOW, [key])
    revoked = revoke(resources, key.key_id, actor="joe", reason="leaked")
    assert revoked == key._replace(revoked_at=NOW, revoked_by="joe", revoked_reason="leaked")
    assert listed(resources) == (NOW, [])
    assert listed(resources, with_revoked=True) == (NOW, [revoked])
    assert refused(Keyring(resources), added.secret, NOW) == KeyRefusal.REVOKED
    # A repeat leaves the first revocation as it is.
    assert revoke(resources, key.key_id, actor="jim") == revoked


def test_a_name_is_one_keys_until_it_is_revoked(resources: Resources) -> None:
    first = tts(resources)
    with pytest.raises(AccountError, match=r"^name: another key is called 'tts'; revoke that one first"):
        tts(resources)
    assert revoke(resources, "tts", actor="jane").key_id == first.key.key_id
    second = tts(resources)
    with pytest.raises(AccountError, match=r"^name: another"):
        tts(resources)
    assert revoke(resources, "tts", actor="jane").key_id == second.key.key_id
    with pytest.raises(AccountError, match=r"^key: no key 'tts'"):
        revoke(resources, "tts", actor="jane")
    assert len(listed(resources, with_revoked=True)[1]) == 2
    assert len(listed(resources, with_revoked=True, limit=1)[1]) == 1


def test_of_many_that_make_a_key_of_one_name_one_does(settings: Settings, resources: Resources) -> None:
    together = Barrier(6)

    def attempt(_: int) -> str:
        together.wait()
        try:
            return tts(resources).secret
        except AccountError:
            return ""

    with ThreadPoolExecutor(6) as threads:
        secrets = [secret for secret in threads.map(attempt, range(6)) if secret]
    assert rows(settings, "SELECT count(*) FROM api_key") == [(len(secrets),)] == [(1,)]
    assert Keyring(resources).authenticate(secrets[0], datetime.now(UTC)).name == "tts"


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_a_name_that_is_being_taken_is_waited_for(settings: Settings, resources: Resources, outcome: str) -> None:
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url) as other, ThreadPoolExecutor(1) as thread:
        ledger_keys.insert_key(other, "0" * 12, bytes(32), "tts", Role.READER, Cause("joe", None), None)
        waiting = thread.submit(tts, resources)
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: rows(settings, query) == [(1,)], "the second one waits")
        getattr(other, outcome)()
        if outcome == "commit":
            with pytest.raises(AccountError, match="name: another key"):
                waiting.result()
        else:
            assert waiting.result().key.name == "tts"


def test_a_key_whose_maker_was_killed_is_there_and_can_be_revoked(settings: Settings) -> None:
    killed_in(settings, tts)
    with worker_resources(settings) as resources:
        with pytest.raises(AccountError, match="name: another key"):
            tts(resources)
        assert revoke(resources, "tts", actor="jane").revoked_at is not None


BAD_NAMES: list[Any] = [
    "",
    " ",
    "tts ",
    " tts",
    "a\nb",
    "a\0b",
    "x" * (MAX_CAUSE + 1),
    "0123456789ab",
    None,
    7,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_wrong_name_is_named_and_nothing_is_written(settings: Settings, resources: Resources, name: Any) -> None:
    with pytest.raises(AccountError, match=r"^name: must "):
        add(resources, name, Role.READER, actor="jane")
    assert rows(settings, "SELECT count(*) FROM api_key") == [(0,)]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"role": "admin"}, r"^role: must be one of producer, reader, support, operator \(got 'admin'\)"),
        ({"role": None}, "^role: must be one of"),
        ({"actor": ""}, "^actor: must be 1 to 256 printable characters"),
        ({"actor": None}, "^actor: missing"),
        ({"reason": "a\nb"}, "^reason: must be 1 to 256 printable characters"),
        ({"expires_at": datetime(2036, 1, 1)}, "^expires_at: must be a time with an offset"),  # noqa: DTZ001
        ({"expires_at": "2036-01-01T00:00:00Z"}, "^expires_at: must be a time with an offset"),
        ({"expires_at": NOW}, r"^expires_at: must be after 2026-11-20T10:00:00\+00:00, which is now"),
        ({"expires_at": datetime.max.replace(tzinfo=UTC)}, "^expires_at: must be before the year"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_key_is_named(
    settings: Settings, resources: Resources, named: dict[str, Any], message: str
) -> None:
    stop_clock(settings, NOW)
    given = {"role": Role.READER, "actor": "jane"} | named
    with pytest.raises(AccountError, match=message):
        add(resources, "tts", **given)
    assert rows(settings, "SELECT count(*) FROM api_key") == [(0,)]


@pytest.mark.parametrize("key", ["", "nobody", "0123456789ab", "a\0b", None, "\ud800"], ids=ascii)
def test_a_key_that_is_not_there_cannot_be_revoked(resources: Resources, key: Any) -> None:
    with pytest.raises(AccountError, match=r"^key: no key "):
        revoke(resources, key, actor="jane")
    with pytest.raises(AccountError, match=r"^actor: missing"):
        revoke(resources, key, actor=None)  # type: ignore[arg-type]


def test_there_are_no_more_keys_than_a_process_may_read(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MAX_KEYS", 2)
    for name in ("one", "two"):
        add(resources, name, Role.READER, actor="jane")
    with pytest.raises(AccountError, match=r"^name: there are 2 keys already; revoke one"):
        add(resources, "three", Role.READER, actor="jane")
    revoke(resources, "one", actor="jane")
    third = add(resources, "three", Role.READER, actor="jane")
    # Keys in force come first, whatever was revoked last.
    revoke(resources, "two", actor="jane")
    monkeypatch.setattr(api_keys, "MAX_KEYS", 0.5)
    keyring = Keyring(resources)
    assert keyring.authenticate(third.secret, datetime.now(UTC)).name == "three"


def test_the_ledger_refuses_what_is_no_key(settings: Settings, resources: Resources) -> None:
    tts(resources)
    for wrong in (
        "role = 'admin'", "digest = '\\x00'", "expires_at = created_at", "revoked_at = now()", "revoked_by = 'joe'",
        "created_by = NULL", "name = NULL",
    ):  # fmt: skip
        with pytest.raises(psycopg.errors.IntegrityError):
            execute(settings, f"UPDATE api_key SET {wrong}")
    for role in Role:
        execute(settings, "UPDATE api_key SET role = %s", role)


def test_no_table_has_a_secret(settings: Settings, resources: Resources) -> None:
    added = tts(resources, reason="test")
    Keyring(resources).authenticate(added.secret, datetime.now(UTC))
    revoke(resources, "tts", actor="jane")
    random = added.secret.rpartition(added.key.key_id)[2][1:]
    tables = rows(settings, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    written = "".join(str(rows(settings, f"SELECT t::text FROM {table} AS t")) for (table,) in tables)
    assert added.key.key_id in written
    assert random not in written
    assert random not in repr(listed(resources, with_revoked=True))


# ---------------------------------------------------------------------------------------------------------------------
# Recognised


def test_a_process_reads_the_keys_once_in_a_while_however_many_ask(
    resources: Resources, clock: Clock, reads: list[int]
) -> None:
    added, now = tts(resources), datetime.now(UTC)
    keyring = Keyring(resources, clock)
    assert keyring.recall(added.secret, now) is None
    for _ in range(100):
        assert keyring.authenticate(added.secret, now) == keyring.recall(added.secret, now) == added.key
    clock.seconds += 4.999
    assert keyring.recall(added.secret, now) == added.key
    assert reads == [1]
    clock.seconds += 0.001
    assert keyring.recall(added.secret, now) is None
    assert keyring.authenticate(added.secret, now) == added.key
    assert reads == [1, 1]


def test_many_threads_wait_for_one_read(
    resources: Resources, clock: Clock, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    added, now = tts(resources), datetime.now(UTC)
    keyring = Keyring(resources, clock)
    read_known = ledger_keys.read_known
    asking = Barrier(16)

    def read(postgres: Postgres, limit: int) -> list[KnownKey]:
        time.sleep(0.3)  # all others have come meanwhile
        return read_known(postgres, limit)

    def ask(_: int) -> str:
        asking.wait()
        return keyring.authenticate(added.secret, now).name

    monkeypatch.setattr(ledger_keys, "read_known", read)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(16))) == ["tts"] * 16
    assert reads == [1]


def test_guesses_ask_postgres_no_more_than_four_times_a_second(
    resources: Resources, clock: Clock, reads: list[int]
) -> None:
    added, now = tts(resources), datetime.now(UTC)
    keyring = Keyring(resources, clock)
    for number in range(1_000):  # in two seconds
        clock.seconds += 0.002
        assert refused(keyring, secret_of(f"{number:012x}", bytes(32)), now) == KeyRefusal.UNKNOWN
    assert 6 <= len(reads) <= 9
    asked = len(reads)
    assert keyring.authenticate(added.secret, now) == added.key
    # A wrong secret of a key that is there asks for nothing.
    for number in range(100):
        assert refused(keyring, secret_of(added.key.key_id, number.to_bytes(32)), now) == KeyRefusal.UNKNOWN
    assert len(reads) == asked


def test_a_new_key_counts_after_the_pause(resources: Resources, clock: Clock) -> None:
    now = datetime.now(UTC)
    keyring = Keyring(resources, clock)
    assert refused(keyring, secret_of("0" * 12, bytes(32)), now) == KeyRefusal.UNKNOWN
    added = tts(resources)
    clock.seconds += 0.249
    assert refused(keyring, added.secret, now) == KeyRefusal.UNKNOWN
    clock.seconds += 0.001
    assert keyring.authenticate(added.secret, now) == added.key


def test_a_revoked_key_ends_within_the_bound(resources: Resources, clock: Clock) -> None:
    added, now = tts(resources), datetime.now(UTC)
    keyring = Keyring(resources, clock)
    keyring.authenticate(added.secret, now)
    revoke(resources, "tts", actor="jane")
    clock.seconds += 4.999
    assert keyring.authenticate(added.secret, now) == added.key  # the price of not asking
    clock.seconds += 0.001
    assert refused(keyring, added.secret, now) == KeyRefusal.REVOKED


def test_with_no_trust_each_call_asks(settings: Settings, clock: Clock, reads: list[int]) -> None:
    with worker_resources(settings.model_copy(update={"api_key_trusted_ms": 0})) as resources:
        added, now = tts(resources), datetime.now(UTC)
        keyring = Keyring(resources, clock)
        for _ in range(3):
            clock.seconds += 0.001
            assert keyring.recall(added.secret, now) is None
            keyring.authenticate(added.secret, now)
        assert len(reads) == 3
        revoke(resources, "tts", actor="jane")
        clock.seconds += 0.001
        assert refused(keyring, added.secret, now) == KeyRefusal.REVOKED


def test_an_expiry_counts_at_once(resources: Resources, clock: Clock, reads: list[int]) -> None:
    end = datetime.now(UTC) + timedelta(days=1)
    added = tts(resources, expires_at=end)
    keyring = Keyring(resources, clock)
    keyring.authenticate(added.secret, end - timedelta(microseconds=1))
    assert refused(keyring, added.secret, end) == KeyRefusal.EXPIRED
    with pytest.raises(ApiKeyRefused):
        keyring.recall(added.secret, end)
    assert reads == [1]


def test_a_session_ends_with_its_key(resources: Resources, clock: Clock) -> None:
    now = datetime.now(UTC)
    added = tts(resources, expires_at=now + timedelta(hours=1))
    keyring = Keyring(resources, clock)
    assert keyring.key_of(added.key.key_id, now) == added.key
    reasons = []
    for key_id, at in ((added.key.key_id, now + timedelta(hours=1)), ("0" * 12, now)):
        with pytest.raises(ApiKeyRefused) as error:
            keyring.key_of(key_id, at)
        reasons.append(error.value.reason)
    revoke(resources, "tts", actor="jane")
    clock.seconds += 5
    with pytest.raises(ApiKeyRefused) as error:
        keyring.key_of(added.key.key_id, now)
    assert [*reasons, error.value.reason] == [KeyRefusal.EXPIRED, KeyRefusal.UNKNOWN, KeyRefusal.REVOKED]


def test_what_was_revoked_long_ago_is_unknown(settings: Settings, resources: Resources, clock: Clock) -> None:
    added = tts(resources)
    revoke(resources, "tts", actor="jane")
    execute(
        settings, "UPDATE api_key SET created_at = now() - interval '40 days', revoked_at = now() - interval '31 days'"
    )
    assert refused(Keyring(resources, clock), added.secret) == KeyRefusal.UNKNOWN


def poll(database_url: str, redis_url: str, secret: str, ready: str) -> tuple[float, float, str]:
    """In a process of its own: the last moment at which a key was good, the first at which it was not, and why."""
    good_at = 0.0
    with worker_resources(settings_for(database_url, redis_url, api_key_trusted_ms=500)) as resources:
        keyring = Keyring(resources)
        while True:
            asked_at = time.time()
            try:
                keyring.authenticate(secret, datetime.now(UTC))
            except ApiKeyRefused as error:
                return good_at, time.time(), error.reason
            good_at = asked_at
            Path(ready).touch()
            time.sleep(0.01)


def test_every_process_refuses_a_revoked_key_within_the_bound(
    settings: Settings, resources: Resources, tmp_path: Path
) -> None:
    added = tts(resources)
    ready = [tmp_path / "one", tmp_path / "two"]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        urls = settings.database_url or "", settings.redis_url
        polls = [processes.submit(poll, *urls, added.secret, str(each)) for each in ready]
        wait_until(lambda: all(each.exists() for each in ready), "both processes know the key", 60)
        revoke(resources, "tts", actor="jane")
        revoked_at = time.time()
        for each in polls:
            good_at, refused_at, reason = each.result(timeout=60)
            assert reason == KeyRefusal.REVOKED
            assert good_at <= revoked_at + 0.5
            assert refused_at > revoked_at - 0.5


# ---------------------------------------------------------------------------------------------------------------------
# While Postgres is away


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A Postgres that only these tests use, and may stop or freeze."""
    with postgres_server(find_postgres(os.environ)) as server:
        migrate(server.url)
        yield server


@pytest.fixture
def away(postgres: Server) -> Iterator[Server]:
    postgres.start()
    empty_ledger(postgres.url)
    try:
        yield postgres
    finally:
        postgres.thaw() if postgres.running() else postgres.start()


@pytest.fixture
def alone(away: Server) -> Iterator[Resources]:
    """Resources on that Postgres, with short waits."""
    limits = {"statement_timeout_ms": 300, "ledger_answer_grace_ms": 200, "database_connect_timeout_seconds": 2}
    with worker_resources(settings_for(away.url, "redis://127.0.0.1:1/0", **limits)) as resources:
        yield resources


@pytest.mark.once
def test_known_keys_count_for_a_time_while_postgres_is_down(
    away: Server, alone: Resources, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    ending = add(alone, "ending", Role.READER, expires_at=now + timedelta(hours=1), actor="jane")
    added, over = tts(alone), add(alone, "over", Role.READER, actor="jane")
    revoke(alone, "over", actor="jane")
    keyring = Keyring(alone, clock)
    keyring.authenticate(added.secret, now)
    began = clock.seconds
    away.stop()
    for seconds in (5, 100, 899.8):
        clock.seconds = began + seconds
        assert keyring.authenticate(added.secret, now) == added.key
        assert keyring.recall(added.secret, now) == added.key  # without a try
    clock.seconds += 0.1
    assert refused(keyring, over.secret, now) == KeyRefusal.REVOKED
    assert refused(keyring, ending.secret, now + timedelta(hours=1)) == KeyRefusal.EXPIRED
    assert refused(keyring, secret_of(added.key.key_id, bytes(32)), now) == KeyRefusal.UNKNOWN
    # Whose key it is cannot be told: that is no refusal.
    for ask in (keyring.authenticate, keyring.recall):
        with pytest.raises(LedgerUnavailable):
            ask(secret_of("0" * 12, bytes(32)), now)
    clock.seconds = began + 901
    assert keyring.recall(added.secret, now) is None  # it is time for another try
    with pytest.raises(LedgerUnavailable, match=r"^Postgres does not answer"):
        keyring.authenticate(added.secret, now)
    away.start()
    with pytest.raises(LedgerUnavailable):  # it was tried less than a second ago
        keyring.authenticate(added.secret, now)
    clock.seconds += 1
    assert keyring.authenticate(added.secret, now) == added.key
    assert "API keys cannot be read" in caplog.text
    assert added.secret not in caplog.text


@pytest.mark.once
def test_a_process_that_has_read_nothing_lets_nobody_in_while_postgres_is_down(away: Server, alone: Resources) -> None:
    added = tts(alone)
    away.stop()
    with pytest.raises(LedgerUnavailable):
        Keyring(alone).authenticate(added.secret, datetime.now(UTC))


@pytest.mark.once
def test_while_postgres_is_frozen_one_call_waits_for_it_and_the_others_do_not(
    away: Server, alone: Resources, clock: Clock
) -> None:
    added, now = tts(alone), datetime.now(UTC)
    keyring = Keyring(alone, clock)
    keyring.authenticate(added.secret, now)
    away.freeze()
    clock.seconds += 5
    assert keyring.authenticate(added.secret, now) == added.key  # it finds out
    clock.seconds += 1
    assert keyring.recall(added.secret, now) is None

    def seconds(_: int) -> float:
        began = time.monotonic()
        assert (keyring.recall(added.secret, now) or keyring.authenticate(added.secret, now)) == added.key
        return time.monotonic() - began

    with ThreadPoolExecutor(8) as threads:
        trying = threads.submit(seconds, 0)
        wait_until(lambda: keyring._lock.locked(), "one call tries Postgres")
        assert keyring.recall(added.secret, now) == added.key
        assert not trying.done()
        assert trying.result() > 0.1
        clock.seconds += 1
        waited = sorted(threads.map(seconds, range(40)))
    assert waited[-2] < 0.5 < waited[-1]
