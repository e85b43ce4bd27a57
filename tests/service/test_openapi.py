"""The published OpenAPI document: current, whole, and true of what the service answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.serving import Served
from worker.service.access import OPERATIONS
from worker.service.openapi import FILE, exported

DOCUMENT = json.loads(FILE.read_text(encoding="utf-8"))


def test_the_published_document_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == exported(), "run: python -m worker.service.openapi"


def test_it_has_every_operation_with_its_key_and_its_errors() -> None:
    found = {
        (method.upper(), path): operation
        for path, operations in DOCUMENT["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/v1/")
    }
    assert found.keys() == {(each.method, each.path) for each in OPERATIONS}
    for each in OPERATIONS:
        operation = found[each.method, each.path]
        assert operation["security"] == [{"ApiKey": []}]
        assert {"401", "403", "422", "503", str(each.status)} <= operation["responses"].keys()
        assert ("requestBody" in operation) == (each.method == "POST")
        assert operation["description"]
    names = [operation["operationId"] for operation in found.values()]
    assert len(set(names)) == len(names)


def referred(value: Any) -> Iterator[str]:
    """Every reference in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from referred(each)
    elif isinstance(value, list):
        for each in value:
            yield from referred(each)


def test_every_reference_leads_somewhere_and_every_part_is_used() -> None:
    parts = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in DOCUMENT["components"][kind]
    }
    assert set(referred(DOCUMENT)) == parts


def test_answers_and_problems_have_the_fields_that_it_says(served: Served, settings: Settings) -> None:
    give_account(settings, "user-42", "basic")
    who = {"user_id": "user-42", "meter": "premium_voice"}
    for name, answer in (
        ("CheckAnswer", served.post("/v1/check", who)),
        ("HoldAnswer", served.post("/v1/holds", {**who, "amount": 1, "key": "h"})),
        ("ChargeAnswer", served.post("/v1/charge", {**who, "amount": 1, "event_id": "c"})),
        ("EventsAnswer", served.post("/v1/events", [{"event_id": "e", **who, "quantity": 1}])),
        ("UsageSummary", served.get("/v1/usage?user_id=user-42")),
        ("AccountState", served.get("/v1/balances?user_id=user-42")),
        ("Plans", served.get("/v1/plans")),
        ("Ready", served.get("/ready")),
        ("Problem", served.post("/v1/check", {})),
    ):
        schema = DOCUMENT["components"]["schemas"][name]
        assert set(schema.get("required", ())) <= answer.json.keys() <= schema["properties"].keys(), name
