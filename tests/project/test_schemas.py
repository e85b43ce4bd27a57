"""The wire format: the published schemas are current, and every limit is where the design puts it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.answers import CheckAnswer, HoldAnswer, HoldState, Reason
from schemas.events import MAX_AMOUNT, MAX_DIMENSIONS_BYTES, UsageEvent, canonical_multiplier, multiplied
from schemas.export import FOLDER, exported

EXAMPLE: dict[str, Any] = {
    "event_id": "job-7f3",
    "user_id": "user-42",
    "meter": "premium_voice",
    "quantity": 1840,
    "multiplier": "1.5",
    "occurred_at": "2026-11-20T10:00:00Z",
    "source": "tts",
    "reference_id": "variant:abc",
    "hold_key": "job-7f3",
    "dimensions": {
        "model_slug": "m2",
        "voice_slug": "narrator",
        "document_id": "d1",
        "page_idx": 3,
        "backend": "gemini",
        "duration_ms": 5000,
    },
}


def parsed(**changes: Any) -> UsageEvent:
    """The example with some fields changed; a field changed to `...` is left out."""
    fields = {name: value for name, value in {**EXAMPLE, **changes}.items() if value is not ...}
    return UsageEvent.model_validate_json(json.dumps(fields))


def refusal(**changes: Any) -> tuple[str, str]:
    """Field and message of the first complaint about the example with some fields changed."""
    with pytest.raises(ValidationError) as caught:
        parsed(**changes)
    first = caught.value.errors()[0]
    return str(first["loc"][0]) if first["loc"] else "", first["msg"]


def test_published_schemas_are_current() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert on_disk == exported(), "schemas/json is not what the models say; run: python -m schemas.export"


@pytest.mark.parametrize("name", sorted(exported()))
def test_published_schemas_are_sorted_and_closed(name: str) -> None:
    text = exported()[name]
    schema = json.loads(text)
    assert text == json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert schema["additionalProperties"] is False
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_one_schema_per_event_and_answer() -> None:
    assert set(exported()) == {
        "usage_event.schema.json",
        "stream_entry.schema.json",
        "account_limits.schema.json",
        "check_answer.schema.json",
        "credits.schema.json",
        "notice.schema.json",
        "notice_feed.schema.json",
        "hold_answer.schema.json",
        "event_answer.schema.json",
        "charge_answer.schema.json",
        "remaining.schema.json",
        "routing_answer.schema.json",
        "sponsor_answer.schema.json",
        "settlement_answer.schema.json",
        "sponsor_hold_answer.schema.json",
        "credit_answer.schema.json",
        "estimate_answer.schema.json",
        "status.schema.json",
        "health.schema.json",
        "proof_report.schema.json",
        "found_accounts.schema.json",
        "usage_report.schema.json",
        "top_report.schema.json",
        "near_limit_report.schema.json",
        "debtors_report.schema.json",
        "purchased_report.schema.json",
        "uncollected_report.schema.json",
        "simulation_report.schema.json",
    }


def test_event_schema_states_the_limits() -> None:
    schema = json.loads(exported()["usage_event.schema.json"])
    assert sorted(schema["required"]) == ["event_id", "meter", "quantity", "user_id"]
    quantity = schema["properties"]["quantity"]
    assert (quantity["type"], quantity["minimum"], quantity["maximum"]) == ("integer", 0, MAX_AMOUNT)
    assert set(schema["properties"]) == set(EXAMPLE)


def test_the_example_is_valid() -> None:
    event = UsageEvent.model_validate_json(json.dumps(EXAMPLE))
    assert event.occurred_at == datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert event.dimensions == EXAMPLE["dimensions"]
    assert multiplied(event.quantity, event.multiplier or "1") == 2760
    assert UsageEvent.model_validate_json(event.model_dump_json(exclude_none=True)) == event


def test_four_fields_are_enough() -> None:
    event = UsageEvent.model_validate_json('{"event_id":"e","user_id":"u","meter":"m","quantity":0}')
    assert event.model_dump(exclude_none=True) == {"event_id": "e", "user_id": "u", "meter": "m", "quantity": 0}


@pytest.mark.parametrize("field", ["event_id", "user_id", "hold_key"])
class TestIdentifiers:
    @pytest.mark.parametrize("value", ["a", "A" * 128, "Az09._:@|+=/-", "-", "user@example.org", "a/b|c=d+e"])
    def test_valid(self, field: str, value: str) -> None:
        assert getattr(parsed(**{field: value}), field) == value

    @pytest.mark.parametrize(
        "value",
        ["", "a" * 129, "{", "a#b", "a b", "a\r\nb", "a\n", "a\x00", "a\u202eb", "ä", "a,b", 'a"b', "a\\b", "x" * 999],
        ids=ascii,
    )  # fmt: skip
    def test_invalid(self, field: str, value: str) -> None:
        where, message = refusal(**{field: value})
        assert where == field
        assert "should match pattern" in message

    def test_not_text(self, field: str) -> None:
        assert refusal(**{field: 7}) == (field, "Input should be a valid string")


@pytest.mark.parametrize("value", ["a", "premium_voice", "x9_" * 21 + "y"])
def test_meter_valid(value: str) -> None:
    assert parsed(meter=value).meter == value


@pytest.mark.parametrize("value", ["", "a" * 65, "Premium", "a-b", "a.b", "a\n"])
def test_meter_invalid(value: str) -> None:
    where, message = refusal(meter=value)
    assert where == "meter"
    assert "should match pattern" in message


@pytest.mark.parametrize("value", [0, 1, MAX_AMOUNT])
def test_quantity_valid(value: int) -> None:
    assert parsed(quantity=value, multiplier="1").quantity == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "greater than or equal to 0"),
        (MAX_AMOUNT + 1, f"less than or equal to {MAX_AMOUNT}"),
        (2**63, f"less than or equal to {MAX_AMOUNT}"),
        (1.0, "valid integer"),
        (1.5, "valid integer"),
        (True, "valid integer"),
        ("1", "valid integer"),
        (None, "valid integer"),
        ([1], "valid integer"),
    ],
)
def test_quantity_invalid(value: object, message: str) -> None:
    where, detail = refusal(quantity=value)
    assert where == "quantity"
    assert message in detail


@pytest.mark.parametrize("value", ["0", "1", "1.5", "0.000001", "999999.999999", "1.50", "2.0", None, ...])
def test_multiplier_valid(value: object) -> None:
    assert parsed(multiplier=value).multiplier == (None if value is ... else value)


@pytest.mark.parametrize(
    "value", ["", "-1", "+1", "01", "1.", ".5", "1e3", "1.1234567", "1000000", "NaN", "1,5", " 1", "1\n"]
)
def test_multiplier_invalid(value: str) -> None:
    where, message = refusal(multiplier=value)
    assert where == "multiplier"
    assert "should match pattern" in message


def test_multiplier_is_text() -> None:
    assert refusal(multiplier=1.5) == ("multiplier", "Input should be a valid string")
    built = UsageEvent(event_id="e", user_id="u", meter="m", quantity=1, multiplier=Decimal("1.50"))  # type: ignore[arg-type]
    assert built.multiplier == "1.50"


def test_amount_stays_in_range() -> None:
    assert parsed(quantity=MAX_AMOUNT // 2, multiplier="2").quantity == MAX_AMOUNT // 2
    where, message = refusal(quantity=MAX_AMOUNT // 2 + 1, multiplier="2")
    assert where == ""
    assert f"at most {MAX_AMOUNT}" in message


@pytest.mark.parametrize(
    ("quantity", "multiplier", "amount"),
    [
        (3, "0.333333", 0),
        (3_000_003, "0.333333", 999_999),
        (1, "0.999999", 0),
        (10**12, "0.999999", 999_999_000_000),
        (7, "1.5", 10),
        (10**12, "0.7", 700_000_000_000),
        (29, "0.1", 2),
        (100, "1.1", 110),
        (0, "999999.999999", 0),
        (5, "0", 0),
    ],
)
def test_amounts_are_exact_and_rounded_down(quantity: int, multiplier: str, amount: int) -> None:
    assert multiplied(quantity, multiplier) == amount


def test_equal_multipliers_have_one_text() -> None:
    assert [canonical_multiplier(text) for text in ("1", "1.0", "1.50", "10", "0.000", "100.10")] == [
        "1", "1", "1.5", "10", "0", "100.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value",
    ["2026-11-20T10:00:00Z", "2026-11-20T10:00:00.123456+05:30", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"],
)
def test_occurred_at_valid(value: str) -> None:
    assert parsed(occurred_at=value).occurred_at == datetime.fromisoformat(value)


@pytest.mark.parametrize(
    "value", ["2026-11-20T10:00:00", "2026-11-20", "2026-13-01T00:00:00Z", "yesterday", "", 1763632800]
)
def test_occurred_at_invalid(value: object) -> None:
    assert refusal(occurred_at=value)[0] == "occurred_at"


@pytest.mark.parametrize("field", ["source", "reference_id"])
def test_texts(field: str) -> None:
    assert getattr(parsed(**{field: "ü" * 256}), field) == "ü" * 256
    for value in ("a" * 257, "a\nb", "a\x00b", "\x7f"):
        where, message = refusal(**{field: value})
        assert where == field
        assert "should match pattern" in message


def test_dimensions_valid() -> None:
    facts = {"text": "ü", "number": 3, "fraction": 1.5, "flag": True, "nothing": None}
    assert parsed(dimensions=facts).dimensions == facts
    assert parsed(dimensions={}).dimensions == {}
    assert len(parsed(dimensions={f"k{i}": i for i in range(32)}).dimensions or {}) == 32


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({f"k{i}": i for i in range(33)}, "at most 32 items"),
        ({"list": [1]}, "valid"),
        ({"object": {"a": 1}}, "valid"),
        ({"nul": "a\x00b"}, "free of NUL characters"),
        ({"nul\x00": 1}, "free of NUL characters"),
        ([], "an object"),
        ("text", "an object"),
    ],
)
def test_dimensions_invalid(value: object, message: str) -> None:
    where, detail = refusal(dimensions=value)
    assert where == "dimensions"
    assert message in detail


def test_dimensions_are_at_most_two_kibibytes_of_compact_json() -> None:
    overhead = len('{"k":""}')
    assert parsed(dimensions={"k": "x" * (MAX_DIMENSIONS_BYTES - overhead)}).dimensions
    where, message = refusal(dimensions={"k": "x" * (MAX_DIMENSIONS_BYTES - overhead + 1)})
    assert where == "dimensions"
    assert "at most 2048 bytes" in message
    assert refusal(dimensions={"k": "ü" * (MAX_DIMENSIONS_BYTES // 2)})[0] == "dimensions"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_dimensions_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="free of NaN and infinite numbers"):
        UsageEvent(event_id="e", user_id="u", meter="m", quantity=1, dimensions={"n": value})


def test_unknown_and_missing_fields() -> None:
    assert refusal(colour="red") == ("colour", "Extra inputs are not permitted")
    for field in ("event_id", "user_id", "meter", "quantity"):
        assert refusal(**{field: ...}) == (field, "Field required")


def test_events_and_answers_are_frozen() -> None:
    answer = CheckAnswer(user_id="u", meter="m", requested=1, allowed=True, reason=Reason.UNLIMITED)
    with pytest.raises(ValidationError, match="frozen"):
        answer.allowed = False  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        parsed().quantity = 0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        HoldAnswer(user_id="u", meter="m", key="k", state=HoldState.HELD, amount=1, left=1, colour="red")  # type: ignore[call-arg]
