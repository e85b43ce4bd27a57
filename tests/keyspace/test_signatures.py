"""Signatures: who signs, what is refused and why, and that no secret ever shows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from config.settings import Settings, SettingsError, load_settings
from schemas.events import MAX_PAYLOAD_BYTES, SIGNATURE_REFUSALS, Refusal, StreamEntry
from tests.support.entries import CATALOGUE, entry, only, refused
from tests.support.entries import entry_id as id_at
from tests.support.ledger import give_account, rows
from tests.support.payloads import payload
from tests.support.resources import settings_for
from tests.support.signatures import ENDED, KEYS, SECRETS, signature
from tests.support.streams import drain, pending_of, stream_of
from worker.admin import dead_letters
from worker.admin.dead_letters import DeadLetterError
from worker.client import AsyncBilling, Billing
from worker.consumer.intake import Intake
from worker.keyspace import keys
from worker.keyspace.entries import plain_entry
from worker.keyspace.signatures import SignatureCheck, Signer, signer_of
from worker.resources import Resources
from worker.rules.received import Event, Refresh

USER, METER = "u1", "credits"


def settings_of(mode: str, signing_keys: str = KEYS, **overrides: object) -> Settings:
    """Settings with the keys of this module."""
    return load_settings({}, signing_keys=signing_keys, signatures=mode, partitions=1, **overrides)


OFF, OPTIONAL, REQUIRED = (
    Intake(keys.Partition(0), settings_of(mode), CATALOGUE) for mode in ("off", "optional", "required")
)
E1 = payload()


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def complaint(environ: Mapping[str, str]) -> str:
    """The line that these variables are refused with."""
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    return str(caught.value)


def test_keys_are_read_in_order_and_the_first_signs() -> None:
    settings = load_settings({"METERFALL_SIGNING_KEYS": KEYS})
    assert [key.key_id for key in settings.signing_keys] == ["tts", "ocr", "old"]
    assert [key.secret.get_secret_value() for key in settings.signing_keys] == list(SECRETS.values())
    assert [key.ends_at and f"{key.ends_at:%FT%TZ}" for key in settings.signing_keys] == [None, None, ENDED]
    signer = signer_of(settings)
    assert signer is not None
    assert signer.key_id == "tts"
    assert signer_of(load_settings({})) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("tts", "key 1: must be id=secret"),
        (f"tts={SECRETS['tts']} ocr=short", "key 2: must be id=secret"),
        (f"tts={SECRETS['tts'][1:]}", "key 1: must be"),
        (f"={SECRETS['tts']}", "key 1: must be"),
        (f"t:s={SECRETS['tts']}", "key 1: must be"),
        (f"tts={SECRETS['tts']}ü", "key 1: must be"),
        (f"tts={SECRETS['tts']}@tomorrow", "key 1: must be"),
        (f"tts={SECRETS['tts']}@2026-11-20T12:00:00", "key 1: must be"),
        (f"tts={SECRETS['tts']}@", "key 1: must be"),
        (f"tts={SECRETS['tts']},tts={SECRETS['old']}", "key 2: another key has the same id"),
    ],
)
def test_a_mistake_in_the_keys_is_named_without_quoting_them(value: str, says: str) -> None:
    message = complaint({"METERFALL_SIGNING_KEYS": value})
    assert message.startswith(f"METERFALL_SIGNING_KEYS: {says}")
    assert not [part for part in value.split("=")[1:] if part[:16] in message], message
    assert "\n" not in message


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_checking_without_a_key_is_refused(mode: str) -> None:
    assert complaint({"METERFALL_SIGNATURES": mode}).startswith(
        "METERFALL_SIGNATURES: METERFALL_SIGNING_KEYS is unset, and without a key nothing can be checked"
    )


def test_no_secret_is_in_anything_that_is_shown() -> None:
    settings = settings_of("required")
    with Resources.open(settings.model_copy(update={"database_url": "postgresql:///none"})).redis as client:
        shown = [
            repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump()), repr(client),
            repr(settings.signing_keys), repr(signer_of(settings)), repr(vars(SignatureCheck(settings))),
            repr(Billing(settings).context),
        ]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        Settings(signing_keys=f"tts={SECRETS['tts']},ocr", redis_url="x")
    shown += [str(caught.value), repr(caught.value)]
    for text in shown:
        assert not [secret for secret in SECRETS.values() if secret[:16] in text], text


# ---------------------------------------------------------------------------------------------------------------------
# The wire

VECTOR_SECRET = "c0ffee00c0ffee00c0ffee00c0ffee00"
VECTOR_PAYLOAD = (
    '{"event_id":"job-7f3","user_id":"user-42","meter":"premium_voice","quantity":1840,"source":"é"}'.encode()
)
# As `openssl dgst -sha256 -hmac` says.
VECTOR = "tts:308cf1833c753d9627869ad85fe9455e0ef2aebc4df414adb10c129d9d1f40a2"


def test_the_vector_of_the_wire_format() -> None:
    (key,) = load_settings({"METERFALL_SIGNING_KEYS": f"tts={VECTOR_SECRET}"}).signing_keys
    assert Signer(key).sign(VECTOR_PAYLOAD) == VECTOR
    fields = plain_entry(VECTOR_PAYLOAD, Signer(key))
    assert fields == {"v": b"1", "e": VECTOR_PAYLOAD, "s": VECTOR}
    assert StreamEntry(v="1", e=VECTOR_PAYLOAD.decode(), s=VECTOR, m=None)


# ---------------------------------------------------------------------------------------------------------------------
# Checking


@pytest.mark.parametrize("key_id", ["tts", "ocr"])
@pytest.mark.parametrize("marked", [False, True])
def test_what_any_of_the_keys_signed_is_accepted(key_id: str, marked: bool) -> None:
    for intake in (OPTIONAL, REQUIRED):
        found = only(entry(E1, marked=marked, s=signature(E1, key_id)), intake)
        assert isinstance(found, Event)
        assert (found.signed_by, found.marked) == (key_id, marked)


def test_an_event_that_the_model_judges_keeps_its_signer() -> None:
    data = payload(source=None)
    found = only(entry(data, s=signature(data)), REQUIRED)
    assert isinstance(found, Event)
    assert found.signed_by == "tts"


def test_a_signature_that_is_missing() -> None:
    assert refused(entry(E1), REQUIRED).reason is Refusal.MISSING_SIGNATURE
    for intake in (OFF, OPTIONAL):
        found = only(entry(E1), intake)
        assert isinstance(found, Event)
        assert found.signed_by is None


FORGED = {
    "of other bytes": (signature(E1 + b" "), Refusal.BAD_SIGNATURE),
    "with another secret": (signature(E1, "tts", SECRETS["ocr"]), Refusal.BAD_SIGNATURE),
    "under another key's name": (signature(E1, "tts").replace(b"tts", b"ocr"), Refusal.BAD_SIGNATURE),
    "cut": (signature(E1)[:-1], Refusal.BAD_SIGNATURE),
    "empty": (b"", Refusal.BAD_SIGNATURE),
    "no key": (signature(E1).partition(b":")[2], Refusal.BAD_SIGNATURE),
    "capitals": (signature(E1).upper(), Refusal.BAD_SIGNATURE),
    "not text": (b"\xff" * 70, Refusal.BAD_SIGNATURE),
    "a line end": (signature(E1) + b"\n", Refusal.BAD_SIGNATURE),
    "an unknown key": (signature(E1, "new", SECRETS["tts"]), Refusal.UNKNOWN_KEY),
}


@pytest.mark.parametrize(("given_signature", "reason"), FORGED.values(), ids=FORGED.keys())
def test_a_signature_that_is_not_right(given_signature: bytes, reason: Refusal) -> None:
    for intake in (OPTIONAL, REQUIRED):
        found = refused(entry(E1, s=given_signature), intake)
        assert (found.reason, found.signed_by, found.payload) == (reason, None, E1)
        assert not [secret for secret in SECRETS.values() if secret in found.detail]
    assert isinstance(only(entry(E1, s=given_signature), OFF), Event), "off: whatever stands there"


ENDED_MS = 1_795_176_000_000


@pytest.mark.parametrize(("at_ms", "counts"), [(ENDED_MS - 1, True), (ENDED_MS, False), (ENDED_MS + 10**9, False)])
def test_a_key_ends_by_the_time_of_the_entry(at_ms: int, counts: bool) -> None:
    item = entry(E1, s=signature(E1, "old"), raw_id=b"%d-0" % at_ms)
    if counts:
        found = only(item, REQUIRED)
        assert isinstance(found, Event)
        assert found.signed_by == "old"
    else:
        late = refused(item, REQUIRED)
        assert (late.reason, late.signed_by) == (Refusal.EXPIRED_SIGNATURE, None)
        assert ENDED in late.detail


def test_a_forgery_in_the_name_of_an_ended_key_is_a_forgery() -> None:
    item = entry(E1, s=signature(E1, "old", SECRETS["tts"]), raw_id=b"%d-0" % (ENDED_MS + 1))
    assert refused(item, REQUIRED).reason is Refusal.BAD_SIGNATURE


@given(st.binary(max_size=80), st.binary(max_size=120), st.booleans())
def test_nothing_is_parsed_before_its_signature_was_found_right(data: bytes, field: bytes, missing: bool) -> None:
    item = entry(data) if missing else entry(data, s=field)
    assert refused(item, REQUIRED).reason in SIGNATURE_REFUSALS


def test_size_comes_before_the_signature_and_the_signature_before_the_rules() -> None:
    large = payload(source="x" * MAX_PAYLOAD_BYTES)
    assert refused(entry(large), REQUIRED).reason is Refusal.TOO_LARGE
    assert refused(entry(E1, v=b"2"), REQUIRED).reason is Refusal.BAD_VERSION
    bad = payload(quantity=-1)
    assert refused(entry(bad), REQUIRED).reason is Refusal.MISSING_SIGNATURE
    signed = refused(entry(bad, s=signature(bad)), REQUIRED)
    assert (signed.reason, signed.signed_by) == (Refusal.BAD_QUANTITY, "tts")


def test_a_field_given_twice_is_checked_as_it_is_read() -> None:
    other = payload(quantity=8)
    for fields in (
        [b"v", b"1", b"e", E1, b"e", other, b"s", signature(E1)],
        [b"v", b"1", b"s", signature(E1), b"e", E1, b"e", other],
        [b"v", b"1", b"e", other, b"s", signature(other), b"s", signature(E1)],
    ):
        assert refused((id_at(), fields), REQUIRED).reason is Refusal.BAD_SIGNATURE


def test_a_request_to_publish_needs_no_signature() -> None:
    assert isinstance(only((id_at(), [b"v", b"1", b"r", b"u1"]), REQUIRED), Refresh)


def test_a_marked_entry_without_a_signature_still_leaves_pending() -> None:
    assert refused(entry(E1, marked=True), REQUIRED).owner == ("u1", "credits", "e1")


# ---------------------------------------------------------------------------------------------------------------------
# Clients, on real servers


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    made = settings_for(emptied_database_url, redis_url, partitions=1, signing_keys=KEYS, signatures="required")
    give_account(made, USER)
    return made


def refused_reasons(resources: Resources) -> list[str]:
    return [letter.reason for letter in dead_letters.listed(resources)]


def test_every_call_that_records_signs(settings: Settings, redis: Redis, resources: Resources) -> None:
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 1, event_id="emitted")
        with billing.reserve(USER, METER, 5, "job-1") as hold:
            hold.capture("captured", 1)
            hold.settle(1, event_id="settled")
        billing.charge(USER, METER, 1, "charged")
        billing.emit(USER, METER, 1, event_id="closing", hold_key="job-2")
    entries = stream_of(redis, settings, USER)
    assert [fields[b"s"] for fields in entries if b"e" in fields] == [
        signature(fields[b"e"]) for fields in entries if b"e" in fields
    ]
    drain(settings, USER)
    billed = {row[0] for row in rows(settings, "SELECT event_id FROM usage_log")}
    assert billed == {"emitted", "captured", "settled", "charged", "closing"}
    assert refused_reasons(resources) == []
    assert pending_of(redis, settings, USER, METER) == {}


def test_the_client_for_asyncio_signs_too(settings: Settings, resources: Resources) -> None:
    async def emit() -> None:
        async with AsyncBilling.connect(settings) as billing:
            await billing.emit(USER, METER, 1, event_id="a")

    asyncio.run(emit())
    drain(settings, USER)
    assert refused_reasons(resources) == []


def test_without_a_key_nothing_is_signed_and_optional_accepts_it(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    bare = settings.model_copy(update={"signing_keys": (), "signatures": "off"})
    with Billing.connect(bare) as billing:
        billing.emit(USER, METER, 1, event_id="a")
        assert [b"s" in fields for fields in stream_of(redis, settings, USER)] == [False]
        drain(settings.model_copy(update={"signatures": "optional"}), USER)
        billing.emit(USER, METER, 1, event_id="b")
    drain(settings, USER)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("a",)]
    assert refused_reasons(resources) == ["missing_signature"]
    assert pending_of(redis, settings, USER, METER) == {}, "a dead letter is pending no more"


def test_a_rotation_refuses_nothing(settings: Settings, resources: Resources) -> None:
    """Workers learn the new key, producers change over, the old key is taken away."""
    old, new = f"old={SECRETS['old']}", f"new={SECRETS['tts']}"
    steps = [(old, old), (f"{old},{new}", old), (f"{old},{new}", new), (new, new)]
    for number, (of_workers, of_producers) in enumerate(steps):
        with Billing.connect(settings.model_copy(update=_keys(of_producers))) as billing:
            billing.emit(USER, METER, 1, event_id=f"e{number}")
        drain(settings.model_copy(update=_keys(of_workers)), USER)
    assert refused_reasons(resources) == []
    assert rows(settings, "SELECT count(*) FROM usage_log") == [(len(steps),)]


def _keys(text: str) -> dict[str, Any]:
    return {"signing_keys": load_settings({"METERFALL_SIGNING_KEYS": text}).signing_keys}


def append(redis: Redis, data: bytes, field: bytes | None) -> None:
    fields: dict[Any, Any] = {"v": "1", "e": data} | ({"s": field} if field is not None else {})
    redis.xadd(keys.Partition(0).entries, fields)


def test_a_signed_entry_sent_again_is_a_duplicate(settings: Settings, redis: Redis, resources: Resources) -> None:
    for _ in range(3):
        append(redis, E1, signature(E1))
    drain(settings, USER)
    append(redis, E1, signature(E1))
    drain(settings, USER)
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("e1", 7)]
    assert refused_reasons(resources) == []


# ---------------------------------------------------------------------------------------------------------------------
# Dead letters


def letters(resources: Resources) -> list[int]:
    return [letter.id for letter in dead_letters.listed(resources)]


def test_a_letter_that_a_producer_had_signed_is_replayed_signed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    """Its key may have ended since: what was found right once is signed anew."""
    append(redis, payload(event_id="late", occurred_at="2020-01-01T00:00:00Z"), None)
    data = payload(occurred_at="2024-01-01T00:00:00Z")
    append(redis, data, signature(data, "ocr"))
    drain(settings, USER)
    unsigned, signed = dead_letters.listed(resources)
    assert (unsigned.signed_by, signed.signed_by) == (None, "ocr")
    dead_letters.replay(resources, signed.id)
    assert stream_of(redis, settings, USER)[-1][b"s"] == signature(data, "tts")
    drain(settings.model_copy(update={"event_max_age_days": 3_650}), USER)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("e1",)]


@pytest.mark.parametrize("field", [None, signature(E1, "tts", SECRETS["ocr"]), signature(E1, "old")])
def test_what_nobody_signed_is_replayed_only_if_an_operator_vouches_for_it(
    settings: Settings, redis: Redis, resources: Resources, field: bytes | None
) -> None:
    append(redis, E1, field)
    redis.xadd(
        keys.Partition(0).entries,
        {"v": "1", "e": payload(event_id="e2"), "s": signature(E1, "old")},
        id=f"{ENDED_MS * 2}-0",
    )
    drain(settings, USER)
    first, second = letters(resources)
    for letter in (first, second):
        with pytest.raises(DeadLetterError, match=r"no key vouches for it; .* --vouch"):
            dead_letters.replay(resources, letter)
    assert redis.xlen(keys.Partition(0).entries) == 0
    redis.delete(keys.Partition(0).entries)
    dead_letters.replay(resources, first, vouch=True)
    drain(settings, USER)
    assert rows(settings, "SELECT event_id FROM usage_log") == [("e1",)]
    assert letters(resources) == [second]


def test_where_signatures_are_optional_only_a_forgery_must_be_vouched_for(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    optional = settings.model_copy(update={"signatures": "optional"})
    append(redis, payload(occurred_at="2024-01-01T00:00:00Z"), None)
    append(redis, payload(event_id="e2"), signature(E1))
    drain(optional, USER)
    old, forged = letters(resources)
    lenient = Resources(optional, resources.catalogue, resources.engine, resources.redis)
    dead_letters.replay(lenient, old)
    assert [b"s" in fields for fields in stream_of(redis, settings, USER)] == [False], "nobody vouched for it"
    with pytest.raises(DeadLetterError, match="no key vouches"):
        dead_letters.replay(lenient, forged)
