"""Reports and changes of accounts over HTTP: what `Accounts` does, with the name of the key as the actor."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from config.settings import Settings
from tests.support.ledger import give_account, rows
from tests.support.serving import Reply, Served
from tests.support.streams import drain

USER, METER = "user-42", "premium_voice"
WHO = {"user_id": USER, "meter": METER}


def changed(served: Served, path: str, body: dict[str, Any], role: str = "operator", **headers: str) -> Reply:
    """Make a change that must succeed."""
    answer = served.post(f"/v1/accounts/{path}", {"user_id": USER, **body}, role, **headers)
    assert answer.status == 200, answer
    return answer


def purchased(answer: Reply) -> int:
    """The purchased units of the meter after a change."""
    return int(next(each["purchased"] for each in answer.json["account"]["meters"] if each["meter"] == METER))


def test_an_account_goes_its_whole_way(served: Served, settings: Settings) -> None:
    opened = changed(served, "open", {"plan": "basic", "reason": "checkout cs_8"})
    assert (opened.json["account"]["plan"], opened.json["repeated"]) == ("basic", False)
    assert changed(served, "open", {"plan": "basic"}).json["repeated"] is True

    grant = {"meter": METER, "amount": 5_000}
    assert purchased(changed(served, "grant", grant, "support", Idempotency_Key="order-9")) == 5_000
    assert changed(served, "grant", {**grant, "key": "order-9"}, "support").json["repeated"] is True
    taken = changed(served, "claw-back", {"meter": METER, "order": "order-9", "total_refunded": 2_000}, "support")
    assert (taken.json["taken"], purchased(taken)) == (2_000, 3_000)
    stale = changed(served, "claw-back", {"meter": METER, "order": "order-9", "total_refunded": 1_000}, "support")
    assert stale.json["stale"] is True
    part = changed(served, "claw-back", {"meter": METER, "amount": 10, "order": "order-9"}, Idempotency_Key="refund-1")
    assert purchased(part) == 2_990

    served.post("/v1/charge", {**WHO, "amount": 40, "event_id": "job-1"})
    drain(settings, USER)
    assert changed(served, "reverse", {"event_id": "job-1"}, "support").json["repeated"] is False
    start = datetime.now(UTC).replace(microsecond=0)
    renewed = {"period_start": start.isoformat(), "period_end": (start + timedelta(days=31)).isoformat()}
    assert changed(served, "renew", renewed, Idempotency_Key="in-17").json["stale"] is False
    other = {**renewed, "period_end": (start + timedelta(days=30)).isoformat(), "user_id": USER, "invoice_id": "in-17"}
    conflict = served.post("/v1/accounts/renew", other, "operator")
    assert (conflict.status, conflict.problem["title"]) == (409, "Key conflict")
    assert changed(served, "change-plan", {"plan": "plus"}, "support").json["account"]["plan"] == "plus"
    later = changed(served, "change-plan", {"plan": "basic", "at": "period_end"})
    assert later.json["account"]["next_plan"] == "basic"
    assert changed(served, "set-limit", {"meter": METER, "per": "day", "amount": 100, "of": "user"}, "support").status
    assert changed(served, "set-limit", {"meter": METER, "per": "day", "amount": None, "of": "user"}, "support").status
    assert changed(served, "set-trust", {"trust": "trusted"}).json["account"]["trust"] == "trusted"
    assert changed(served, "set-status", {"status": "suspended", "reason": "abuse"}, "support").status
    drain(settings, USER)  # a worker publishes it
    assert served.post("/v1/check", WHO).json["reason"] == "suspended"

    actors = rows(settings, "SELECT entry_key, actor FROM ledger_entry WHERE actor IS NOT NULL")
    assert ("grant:order-9", "the-support") in actors
    assert {actor for _, actor in actors} == {"the-operator", "the-support"}
    kept = served.post("/v1/accounts/close", {"user_id": USER}, "operator")
    assert (kept.status, kept.problem["field"]) == (422, "forfeit")
    assert changed(served, "close", {"forfeit": True}).json["name"] != USER


def test_the_reports_of_an_account(served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    served.post("/v1/events", [
        {"event_id": f"e-{number}", **WHO, "quantity": 10, "dimensions": {"voice_slug": "narrator"}}
        for number in range(5)
    ])  # fmt: skip
    drain(settings, USER)
    changed(served, "grant", {"meter": METER, "amount": 7, "key": "order-1"})
    changed(served, "set-limit", {"meter": METER, "per": "day", "amount": 100})

    def read(path: str, **query: object) -> Any:
        answer = served.get(f"/v1/{path}?" + "&".join(f"{name}={value}" for name, value in query.items()))
        assert answer.status == 200, answer
        return answer.json

    (meter,) = [each for each in read("balances", user_id=USER)["meters"] if each["meter"] == METER]
    assert (meter["used"], meter["purchased"], meter["limit"]) == (50, 7, 100_000)
    assert next(each["available"] for each in read("usage", user_id=USER)["meters"] if each["meter"] == METER) == 50
    assert read("breakdown", user_id=USER)["voices"][0]["voice"] == "narrator"
    assert read("engagement", user_id=USER)["syntheses"] == 5
    first = read("timeline", user_id=USER, limit=2)
    assert [change["kind"] for change in first["changes"]][1] == "grant"
    assert len(read("timeline", user_id=USER, limit=1_000, before_seq=first["more_before_seq"])["changes"]) >= 5
    assert [event["event_id"] for event in read("events", user_id=USER, limit=2)["events"]] == ["e-4", "e-3"]
    assert read("explain", user_id=USER, event_id="e-0")["state"] == "applied"
    assert read("credits", user_id=USER)["grants"][0]["order"] == "order-1"
    assert read("limits", user_id=USER)["limits"][0]["amount"] == 100
    assert {"basic", "plus"} <= {plan["plan"] for plan in read("plans")["plans"]}
    assert read("notices", after=0, limit=10, kind="balance.threshold", user_id=USER)["notices"] == []


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("usage", "user_id"),
        ("usage?user_id=a%20b", "user_id"),
        ("timeline?user_id=u&limit=0", "limit"),
        ("timeline?user_id=u&limit=1001", "limit"),
        ("timeline?user_id=u&limit=x", "limit"),
        ("timeline?user_id=u&before_seq=0", "before_seq"),
        ("events?user_id=u&limit=9999999999999999999999", "limit"),
        ("breakdown?user_id=u&documents=0", "documents"),
        ("explain?user_id=u", "event_id"),
        ("notices?after=-1", "after"),
        ("notices?limit=1001", "limit"),
        ("notices?kind=no.such", "kind.0"),
    ],
)
def test_a_wrong_query_names_its_field(served: Served, path: str, field: str) -> None:
    answer = served.get(f"/v1/{path}")
    assert (answer.status, answer.problem["field"]) == (422, field)


READS_OF_AN_ACCOUNT = (
    "balances", "credits", "limits", "usage", "breakdown", "engagement", "timeline", "events", "explain",
)  # fmt: skip


def test_an_unknown_account_or_event_is_not_found(served: Served, settings: Settings) -> None:
    for path in READS_OF_AN_ACCOUNT:
        answer = served.get(f"/v1/{path}?user_id=nobody" + ("&event_id=e" if path == "explain" else ""))
        assert (answer.status, answer.problem["title"]) == (404, "Not found"), path
        if path != "explain":  # an event may be refused before there is an account
            assert (answer.problem["reason"], answer.problem["field"]) == ("unknown_account", "user_id"), path
    nobody = {"user_id": "nobody"}
    for path, body in (
        ("grant", {"meter": METER, "amount": 1, "key": "k"}), ("claw-back", {"meter": METER, "amount": 1, "key": "k"}),
        ("reverse", {"event_id": "e"}), ("change-plan", {"plan": "basic"}), ("set-status", {"status": "active"}),
        ("set-limit", {"meter": METER, "per": "day", "amount": 1, "of": "user"}), ("close", {}),
        ("forgive-debt", {"meter": METER, "amount": 1, "key": "k", "reason": "r"}), ("set-trust", {"trust": "trusted"}),
        ("renew", {"period_start": "2026-11-20T10:00:00Z", "period_end": "2026-12-20T10:00:00Z", "invoice_id": "i"}),
    ):  # fmt: skip
        answer = served.post(f"/v1/accounts/{path}", {**nobody, **body}, "operator")
        assert (answer.status, answer.problem["reason"]) == (404, "unknown_account"), (path, answer.problem)
    give_account(settings, USER, "basic")
    for answer in (
        served.get(f"/v1/explain?user_id={USER}&event_id=none"),
        served.post("/v1/accounts/reverse", {"user_id": USER, "event_id": "none"}, "operator"),
    ):
        assert (answer.status, answer.problem["reason"]) == (404, "unknown_event")


def test_questions_before_the_work_answer_an_unknown_account(served: Served) -> None:
    unknown = {**WHO, "user_id": "nobody"}
    check = served.post("/v1/check", unknown)
    assert (check.status, check.json["allowed"], check.json["reason"]) == (200, False, "unknown_account")
    remaining = served.get("/v1/remaining?user_id=nobody", "producer")
    assert (remaining.status, remaining.json["remaining"]) == (200, 0)
    assert served.post("/v1/charge", {**unknown, "amount": 1, "event_id": "c"}).problem["reason"] == "unknown_account"


@pytest.mark.parametrize(
    ("path", "change", "status", "field"),
    [
        ("open", {"user_id": "new", "plan": "no_such_plan"}, 422, "plan"),
        ("open", {"user_id": "new", "plan": "basic", "status": "asleep"}, 422, "status"),
        ("open", {"plan": "basic", "period_start": 1_763_632_800}, 422, "period_start"),
        ("open", {"plan": "basic", "period_start": "2026-11-20T10:00:00"}, 422, "period_start"),
        ("open", {"plan": "basic", "actor": "somebody"}, 422, "actor"),
        ("grant", {"meter": METER, "amount": 1}, 422, "key"),
        ("grant", {"meter": METER, "amount": 0, "key": "k"}, 422, "amount"),
        ("grant", {"meter": METER, "amount": 6, "key": "taken"}, 409, "key"),
        ("grant", {"meter": METER, "amount": 1, "key": "k", "category": "stolen"}, 422, "category"),
        ("claw-back", {"meter": METER, "amount": 1}, 422, "key"),
        ("reverse", {"event_id": "no-such-event"}, 404, "event_id"),
        ("renew", {"period_start": "2026-11-20T10:00:00Z", "period_end": "2026-11-19T10:00:00Z", "invoice_id": "i"},
         422, "period_end"),
        ("change-plan", {"plan": "plus", "at": "noon"}, 422, "at"),
        ("set-limit", {"meter": METER, "per": "hour", "amount": 1}, 422, "per"),
        ("set-status", {"status": "active", "reason": "x\ny"}, 422, "reason"),
        ("set-trust", {"trust": "royal"}, 422, "trust"),
        ("forgive-debt", {"meter": METER, "key": "f-1"}, 422, "amount"),
    ],
)  # fmt: skip
def test_a_wrong_change_is_refused_and_changes_nothing(
    served: Served, settings: Settings, path: str, change: dict[str, Any], status: int, field: str
) -> None:
    give_account(settings, USER, "basic")
    changed(served, "grant", {"meter": METER, "amount": 5, "key": "taken"})
    before = rows(settings, "SELECT count(*) FROM ledger_entry")
    answer = served.post(f"/v1/accounts/{path}", {"user_id": USER, **change}, "operator")
    assert (answer.status, answer.problem["field"].partition(".")[0]) == (status, field)
    assert rows(settings, "SELECT count(*) FROM ledger_entry") == before


def test_a_sponsored_request_goes_its_whole_way(served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    changed(served, "set-trust", {"trust": "trusted"})
    asked = {"user_id": USER, "estimate": 40}
    decided = served.post("/v1/sponsorship/decide", asked, Idempotency_Key="request-17")
    assert (decided.status, decided.json["serve"], decided.json["absorb"]) == (200, "free", 40)
    repeated = served.post("/v1/sponsorship/decide", {**asked, "request_id": "request-17"})
    assert repeated.json["repeated"] is True
    conflict = served.post("/v1/sponsorship/decide", {**asked, "estimate": 41, "request_id": "request-17"})
    assert conflict.status == 409
    settled = served.post("/v1/sponsorship/settle", {"user_id": USER, "actual": 31, "request_id": "request-17"})
    assert (settled.json["absorbed"], settled.json["returned"]) == (31, 9)
    confirmed = served.post("/v1/sponsorship/confirm", {**asked, "paid": 30, "request_id": "request-18"})
    assert (confirmed.json["absorb"], confirmed.json["paid"]) == (10, 30)
    released = served.post(
        "/v1/sponsorship/release", {"user_id": USER, "request_id": "request-18", "reason": "no such work"}
    )
    assert released.json["state"] == "held"
    gate = served.post("/v1/sponsorship/decide", {"estimate": 40, "request_id": "request-19"})
    assert (gate.json["serve"], gate.json["reason"]) == ("gate", "no_identity")
    credited = served.post("/v1/sponsorship/credit", {"request_id": "order-9", "paid": 500}, "operator")
    assert (credited.status, credited.json["credited"]) == (200, 50)
