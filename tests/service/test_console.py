"""The console without a browser: who gets in, what each page says, and what it refuses."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from config.log import name_in_logs
from config.settings import Settings
from schemas.codes import Role
from tests.support.ledger import give_account, give_accounts, rows
from tests.support.pages import Person
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.serving import Served, serving
from tests.support.streams import drain, partition_of
from tests.support.waiting import wait_until
from worker.admin import api_keys, credits
from worker.rules.api_keys import RIGHTS, Right
from worker.service.console.app import PAGES

USER, METER = "user-42", "premium_voice"
ACCOUNT = f"/console/account?user_id={USER}"


@pytest.fixture
def person(served: Served) -> Person:
    """An operator who has signed in."""
    person = Person(served.port)
    assert person.sign_in(served.secrets["operator"]).status == 200
    return person


def support(served: Served) -> Person:
    """A support person who has signed in."""
    person = Person(served.port)
    assert person.sign_in(served.secrets["support"]).status == 200
    return person


# ---------------------------------------------------------------------------------------------------------------------
# Who gets in


def test_a_person_signs_in_and_out(served: Served) -> None:
    person = Person(served.port)
    asked = person.get("/console")
    assert (asked.status, "Sign in" in asked.text) == (200, True)
    before = person.cookie
    overview = person.send(asked.form("/console/sign-in"), key=served.secrets["support"])
    assert (overview.status, "Overview" in overview.text) == (200, True)
    assert "the-support (support)" in overview.text
    assert person.cookie != before
    assert {"HttpOnly", "SameSite=strict", "Path=/console"} <= set(person.set_cookie.split("; "))
    assert "Secure" not in person.set_cookie
    assert served.secrets["support"] not in person.cookie + overview.html + served.logged()
    left = person.send(overview.form("/console/sign-out"))
    assert "Sign in" in left.text
    assert "Overview" not in person.get("/console/").text


def test_a_cookie_for_another_machine_goes_over_tls_alone(served: Served) -> None:
    assert "Secure" in cookie_attributes(Person(served.port, "console.example.com"))
    assert "Secure" in cookie_attributes(Person(served.port), {"X-Forwarded-Proto": "https"})
    assert "Secure" not in cookie_attributes(Person(served.port))


def cookie_attributes(person: Person, headers: dict[str, str] | None = None) -> list[str]:
    person.ask("GET", "/console/sign-in", headers=headers)
    return person.set_cookie.split("; ")


@pytest.mark.parametrize(
    ("secret", "status", "said"),
    [
        ("", 401, "missing"),
        ("x", 401, "must be mf_"),
        ("mf_000000000000_" + "A" * 43, 401, "there is no such key"),
        ("producer", 403, "has the role producer"),
        ("reader", 403, "has the role reader"),
    ],
)
def test_a_key_that_may_not_sign_in_is_refused(served: Served, secret: str, status: int, said: str) -> None:
    person = Person(served.port)
    refused = person.sign_in(served.secrets.get(secret, secret))
    assert refused.status == status
    assert said in refused.text
    assert "A" * 43 not in refused.html + served.logged()
    assert "Sign in" in person.get("/console/").text


def test_every_page_wants_a_session_and_a_right(served: Served, settings: Settings, person: Person) -> None:
    give_account(settings, USER, "basic")
    helper = support(served)
    for each in PAGES:
        path = f"/console{each.path}?user_id={USER}"
        anybody = Person(served.port)
        assert anybody.ask("GET", path).headers["location"] == "/console/sign-in", each
        if each.takes_form:
            assert anybody.ask("POST", path, {"step": "preview"}).status == 401, each
        assert person.ask("GET", path).status in {200, 422}, each
        expected = {200, 422} if each.right in RIGHTS[Role.SUPPORT] else {403}
        assert helper.ask("GET", path).status in expected, each


def test_a_session_ends_with_its_key_or_its_time_and_cannot_be_made_up(
    served: Served, settings: Settings, person: Person
) -> None:
    form = person.get("/console/").form("/console/sign-out")
    right = person.cookie
    for wrong in (right[:-1] + ("A" if right[-1] != "A" else "B"), "meterfall_console=x", right.replace(".", ".9", 2)):
        person.cookie = wrong
        assert "Sign in" in person.get("/console/").text
    person.cookie = right
    assert person.get("/console/").status == 200
    with worker_resources(settings) as resources:
        short = api_keys.add(
            resources, "short", Role.SUPPORT, expires_at=datetime.now(UTC) + timedelta(seconds=3), actor="tests"
        )
        helper = Person(served.port)
        assert "Overview" in helper.sign_in(short.secret).text
        wait_until(lambda: "Sign in" in helper.get("/console/").text, "the key expires", seconds=15)
        api_keys.revoke(resources, "the-operator", actor="tests")
    wait_until(lambda: "Sign in" in person.get("/console/").text, "the key is revoked", seconds=15)
    assert Person(served.port).send(form).status == 200  # to sign out without a session is harmless


@pytest.mark.parametrize("variables", [{}, {"METERFALL_CONSOLE_SECRET": "x" * 32}], ids=["made at the start", "given"])
def test_several_processes_share_sessions_and_a_secret_outlives_them(
    settings: Settings, tmp_path: Path, variables: dict[str, str]
) -> None:
    with serving(settings, tmp_path, "--processes", "2", variables=variables) as first:
        person = Person(first.port)
        person.sign_in(first.secrets["operator"])
        for _ in range(10):
            assert "the-operator" in person.get("/console/").text
    with serving(settings, tmp_path, keys=False, variables=variables) as second:
        person.port = second.port
        assert ("the-operator" in person.get("/console/").text) is bool(variables)


def test_a_form_of_another_page_changes_nothing(served: Served, settings: Settings, person: Person) -> None:
    give_account(settings, USER, "basic")
    path = f"/console/account/set-status?user_id={USER}"
    form = person.get(path).form("/console/account/set-status")
    fields = form.fields | {"status": "paused", "reason": "asked for it", "step": "preview"}
    stranger = support(served).get(path).form("/console/account/set-status").fields["token"]
    for token in ("", "x", stranger, "\ud83d"):
        refused = person.ask("POST", path, fields | {"token": token.encode("utf-8", "replace")})
        assert refused.status == 403
        assert "Nothing was done" in refused.text
    for kind, body in (("application/json", 415), ("multipart/form-data; boundary=x", 415)):
        assert person.ask("POST", path, fields, {"Content-Type": kind}).status == body
    assert person.ask("POST", path, {str(number): "x" for number in range(65)}).status == 400
    assert person.send(form, status="paused", reason="asked for it", step="preview").status == 200


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_the_overview_tells_the_state(served: Served, settings: Settings, person: Person) -> None:
    give_account(settings, USER, "basic")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1})
    wait_until(lambda: "Waiting 1, the oldest" in person.get("/console/").text, "the event waits", seconds=10)
    page = person.get("/console/")
    for said in ("Down", "nobody drains", "Remedy:", "Redis: ", "Postgres: answers", "Last proof none yet"):
        assert said in page.text
    assert int(page.headers["refresh"]) > 0
    still = person.get("/console/?still=1")
    assert "refresh" not in still.headers
    told = r'<time datetime="\d{4}-\d\d-\d\dT[^"]+" title="\d{4}-\d\d-\d\d [0-9:]+ UTC">\d+ s ago'
    assert re.search(told, still.html)


def test_accounts_are_found(served: Served, settings: Settings, person: Person) -> None:
    give_accounts(settings, [f"team/{number:02}" for number in range(27)], "basic")
    give_account(settings, "debtor", "basic", buckets={METER: (99_000, -1_234, 0)})
    every = person.get("/console/accounts")
    assert "28 accounts" in every.text
    first = person.get("/console/accounts?q=team/")
    assert "27 accounts" in first.text
    assert "team/26" in person.get(first.links["More accounts"]).text
    one = person.get("/console/accounts?q=debtor")
    assert one.path.startswith("/console/account?")
    named = person.get(f"/console/accounts?q={name_in_logs('debtor', 'hashed')}")
    assert "debtor" in named.links
    assert "debtor" in person.get(f"/console/accounts?q={name_in_logs('debtor', 'hashed').removeprefix('user:')}").links
    near = person.get("/console/accounts?show=near-limit")
    assert "99,000" in near.text
    assert "1,234" in person.get("/console/accounts?show=debtors").text
    assert "No account is found" in person.get("/console/accounts?q=nobody").text
    wrong = person.get("/console/accounts?q=a%20b")
    assert (wrong.status, "prefix: must be" in wrong.text) == (422, True)


def test_an_account_shows_its_waterfall_timeline_events_and_holds(
    served: Served, settings: Settings, person: Person
) -> None:
    give_account(settings, USER, "basic", buckets={METER: (60_000, 5_000, 0)})
    with worker_resources(settings) as resources:
        credits.grant(resources, USER, METER, 8_000, "order-1", actor="shop", reason="<b>thanks</b>")
    served.post(
        "/v1/events",
        {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500, "dimensions": {"voice_slug": "<i>"}},
    )
    drain(settings, USER)
    served.post("/v1/holds", {"user_id": USER, "meter": METER, "amount": 700, "key": "job-9"})
    page = person.get(ACCOUNT)
    assert page.status == 200
    for said in ("61,500 used of 100,000", "rollover 5,000", "8,000", "order-1", "job-9", "700", "shop: <b>thanks</b>"):
        assert said in page.text
    assert "<b>thanks" not in page.html
    assert 'class="used" x="0.0" y="0" width="61.5"' in page.html
    told = person.get(page.links["e-1"])
    assert "applied" in told.text
    assert "1,500" in told.text
    assert "<i>" in told.text
    assert "order-1" in page.text
    for wrong in ("user_id=a%20b", "", f"user_id={USER}&changes_before=0"):
        assert person.get(f"/console/account?{wrong}").status == 422
    assert person.get("/console/account?user_id=nobody").status == 404
    assert person.get(f"/console/event?user_id={USER}&event_id=none").status == 404
    assert person.get("/console/no-such-page").status == 404


def test_usage_is_reported_by_day(served: Served, settings: Settings, person: Person) -> None:
    give_accounts(settings, [USER, "user-7"], "basic")
    assert "Nothing was used" in person.get("/console/reports").text
    now = datetime.now(UTC)
    days = [now - timedelta(days=each) for each in (0, 2)]
    events = [
        {
            "event_id": f"e-{number}",
            "user_id": user,
            "meter": METER,
            "quantity": quantity,
            "occurred_at": at.isoformat(),
        }
        for number, (user, quantity, at) in enumerate([(USER, 3_000, days[0]), ("user-7", 500, days[1])])
    ]
    assert served.post("/v1/events", events).status == 202
    for user in (USER, "user-7"):
        drain(settings, user)
    since, until = days[1].date(), now.date() + timedelta(days=1)
    page = person.get(f"/console/reports?since={since}&until={until}")
    for said in ("3,500 in all, 3,000 on the busiest day", f"{since}: 500 in 1 event"):
        assert said in page.text
    assert 'height="16.667"' in page.html
    assert {USER, "user-7"} <= set(page.links)
    table = person.get(page.links["Download as CSV"])
    assert table.headers["content-type"].startswith("text/csv")
    assert table.html.splitlines() == [
        "day,meter,events,amount", f"{since},{METER},1,500", f"{now.date()},{METER},1,3000",
    ]  # fmt: skip
    for wrong in ("since=noon", "since=2026-11-20&until=2026-11-19", "meter=no_such"):
        assert person.get(f"/console/reports?{wrong}").status == 422, wrong


# ---------------------------------------------------------------------------------------------------------------------
# Changes

CHANGES = {
    "grant": ({"meter": METER, "amount": "5,000", "order": "order-9"}, "purchased 8,000 → 13,000"),
    "claw-back": ({"meter": METER, "amount": "3000", "order": "order-1"}, "purchased 8,000 → 5,000"),
    "set-status": ({"status": "paused"}, "status active → paused"),
    "set-limit": ({"meter": METER, "per": "day", "amount": "900"}, "limit per day (operator) none → 900"),
    "change-plan": ({"plan": "plus"}, "allowance 100,000 →"),
    "forgive-debt": ({"meter": "server_kokoro", "amount": ""}, "rollover −250 → 0"),
    "reverse": ({"event_id": "e-1"}, "used 1,500 → 0"),
    "release-hold": ({"meter": METER, "hold": "job-9"}, "hold job-9 700 → 0"),
}


def test_every_change_is_in_the_table_of_the_test() -> None:
    assert set(CHANGES) == {each.path.rpartition("/")[2] for each in PAGES if each.path.startswith("/account/")}


@pytest.fixture
def account(served: Served, settings: Settings) -> None:
    """An account with a grant, an event, a debt and a hold."""
    give_account(settings, USER, "basic", buckets={"server_kokoro": (0, -250, 0)})
    with worker_resources(settings) as resources:
        credits.grant(resources, USER, METER, 8_000, "order-1")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    drain(settings, USER)
    served.post("/v1/holds", {"user_id": USER, "meter": METER, "amount": 700, "key": "job-9"})


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("account")
def test_a_change_is_previewed_confirmed_and_kept_with_its_author(
    name: str, served: Served, settings: Settings
) -> None:
    fields, said = CHANGES[name]
    person = support(served)
    path = f"/console/account/{name}"
    form = person.get(f"{path}?user_id={USER}").form(path)
    entries = rows(settings, "SELECT count(*) FROM ledger_entry")
    state = served.get(f"/v1/balances?user_id={USER}").json

    preview = person.send(form, **fields, reason="ticket 7", step="preview")
    assert preview.status == 200, preview.text
    assert said in preview.text
    assert "the-support" in preview.text
    assert rows(settings, "SELECT count(*) FROM ledger_entry") == entries
    assert served.get(f"/v1/balances?user_id={USER}").json == state

    confirm = preview.form(path)
    done = person.send(confirm, step="confirm")
    assert (done.status, done.path.partition("?")[0]) == (200, "/console/account"), done.text
    assert ": done." in done.text
    again = person.send(confirm, step="confirm")
    assert again.status == 200
    assert "nothing changed" in again.text or "Nothing was released" in again.text
    if name == "release-hold":
        assert "the-support released a hold" in served.logged()
        assert "job-9" not in served.get(f"/v1/timeline?user_id={USER}").body.decode()
    else:
        assert "the-support: ticket 7" in done.text
        kept = rows(settings, "SELECT DISTINCT actor, reason FROM ledger_entry WHERE actor IS NOT NULL")
        assert kept == [("the-support", "ticket 7")]


@pytest.mark.usefixtures("account")
def test_a_change_that_would_do_something_else_than_was_seen_is_not_made(
    served: Served, settings: Settings, person: Person
) -> None:
    path = "/console/account/grant"
    form = person.get(f"{path}?user_id={USER}").form(path)
    preview = person.send(form, meter=METER, amount="10", order="order-9", reason="sorry", step="preview")
    with worker_resources(settings) as resources:
        credits.grant(resources, USER, METER, 1, "order-2")
    moved = person.send(preview.form(path), step="confirm")
    assert moved.status == 409
    assert "has changed since you looked" in moved.text
    assert "purchased 8,001 → 8,011" in moved.text
    assert rows(settings, "SELECT count(*) FROM ledger_entry WHERE entry_key = 'grant:order-9'") == [(0,)]
    for seen in ("", "x"):
        assert person.send(preview.form(path), step="confirm", seen=seen).status == 409
    assert ": done." in person.send(moved.form(path), step="confirm").text
    edit = person.send(preview.form(path), step="edit")
    assert edit.form(path).fields["amount"] == "10"


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("grant", {"amount": "0"}, "amount: must be a whole number from 1"),
        ("grant", {"amount": "1.5"}, "amount: must be a whole number"),
        ("grant", {"amount": "-5"}, "amount: must be a whole number"),
        ("grant", {"amount": ""}, "amount: missing"),
        ("grant", {"amount": "5", "meter": "no_such"}, "meter: unknown"),
        ("grant", {"amount": "5", "reason": ""}, "reason: must be 1 to 256"),
        ("grant", {"amount": "5", "reason": "x\ny"}, "reason: must be 1 to 256"),
        ("grant", {"amount": "5", "order": "a b"}, "key: must be"),
        ("grant", {"amount": "6", "order": "order-1"}, "key: order-1 was used for 8000"),
        ("grant", {"amount": "5", "expires_at": "noon"}, "expires_at: must be a date"),
        ("claw-back", {"amount": "8001"}, "amount: must be at most 8000"),
        ("set-status", {"status": "asleep"}, "status"),
        ("set-status", {"status": "active", "at": "period_end"}, "status: later only"),
        ("change-plan", {"plan": "none"}, "none"),
        ("set-limit", {"meter": METER, "per": "hour", "amount": "5"}, "per: must be one of"),
        ("forgive-debt", {"amount": "1"}, "owes nothing"),
        ("reverse", {"event_id": "no-such"}, "event_id: no event no-such"),
    ],
)
@pytest.mark.usefixtures("account")
def test_a_wrong_form_says_what_is_wrong_and_keeps_what_was_typed(
    served: Served, settings: Settings, person: Person, name: str, fields: dict[str, str], said: str
) -> None:
    path = f"/console/account/{name}"
    form = person.get(f"{path}?user_id={USER}").form(path)
    sent = {"reason": "ticket 7", "step": "preview"} | ({"meter": METER} if "meter" in form.fields else {}) | fields
    entries = rows(settings, "SELECT count(*) FROM ledger_entry")
    for step in ("preview", "confirm"):
        answer = person.send(form, **{**sent, "step": step})
        assert (answer.status, said in answer.text) == (422, True), answer.text
        assert answer.form(path).fields.get("amount", "") == fields.get("amount", "")
    assert rows(settings, "SELECT count(*) FROM ledger_entry") == entries


# ---------------------------------------------------------------------------------------------------------------------
# Dead letters


def refused_events(served: Served, settings: Settings, *ids: str) -> None:
    """Events with an unknown field, which become dead letters."""
    with worker_resources(settings) as resources:
        for each in ids:
            text = f'{{"event_id": "{each}", "user_id": "{USER}", "meter": "{METER}", "quantity": 1, "<b>": 1}}'
            resources.redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": text})
    drain(settings, USER)


def test_dead_letters_are_read_and_resolved_with_author_and_reason(
    served: Served, settings: Settings, person: Person
) -> None:
    give_account(settings, USER, "basic")
    refused_events(served, settings, "e-1", "e-2", "e-3")
    wait_until(lambda: "unknown field 3" in person.get("/console/").text, "the overview tells of them", seconds=10)
    overview = person.get("/console/")
    listed = person.get(overview.links["Look at them"])
    assert "3 letters" in listed.text
    assert "deploy workers as new as the service" in listed.text
    for query, said in (
        ("user=nobody", "None is open"),
        ("state=dropped", "None is dropped"),
        (f"user={USER}", "3 let"),
    ):
        assert said in person.get(f"/console/dead-letters?{query}").text
    (first, *_) = [number for (number,) in rows(settings, "SELECT id FROM dead_letter ORDER BY id")]
    one = person.get(f"/console/dead-letter?id={first}")
    assert '"event_id": "e-1"' in one.text
    assert "<b>" not in one.html

    ask = person.get(one.links["Drop"]).form("/console/dead-letters/resolve")
    assert "why: must be" in person.send(ask, why="").text
    assert "dropped: 1." in person.send(ask, why="a test").text
    again = person.send(ask, why="a test")
    assert "dropped: 0. refused: 1." in again.text

    every = person.get("/console/dead-letters/resolve?do=replay&reason=unknown_field")
    assert "Replay 2 dead letters" in every.text
    refused_events(served, settings, "e-4")
    assert "replayed: 2." in person.send(every.form("/console/dead-letters/resolve"), why="mended").text
    assert rows(settings, "SELECT state, resolved_by, resolved_reason FROM dead_letter ORDER BY id")[:4] == [
        ("dropped", "the-operator", "a test"),
        ("replayed", "the-operator", "mended"),
        ("replayed", "the-operator", "mended"),
        ("open", None, None),
    ]


@pytest.mark.parametrize(
    "query",
    ["dead-letters?state=lost", "dead-letters?after=x", "dead-letter", "dead-letter?id=99", "dead-letter?id=x",
     "dead-letters/resolve?do=burn&id=1", "dead-letters/resolve?do=drop", "dead-letters/resolve?do=drop&id=x",
     "dead-letters/resolve?do=drop&id=99"],
)  # fmt: skip
def test_wrong_questions_about_dead_letters_are_refused(person: Person, query: str) -> None:
    assert person.get(f"/console/{query}").status == 422


def test_support_may_do_what_the_console_offers_it() -> None:
    of_operators = {Right.RESOLVE_DEAD_LETTERS, Right.MANAGE_WEBHOOKS, Right.MANAGE_CATALOGUES}
    assert {each.right for each in PAGES if each.takes_form} <= RIGHTS[Role.SUPPORT] | of_operators


def test_the_guide_tells_every_page() -> None:
    guide = (ROOT / "docs" / "console.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `/console(/[a-z.-]*)` \|", guide, re.MULTILINE)
    changes = ("/account/", "/dead-letters/")
    assert told == ["/", *(each.path for each in PAGES if not each.path.startswith(changes))]
