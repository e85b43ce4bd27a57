"""Pages of the console about the whole system: notices and webhooks, the catalogue, the proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from config.settings import Settings
from schemas.notices import KINDS
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import execute, give_account, rows
from tests.support.pages import Page, Person
from tests.support.resources import worker_resources
from tests.support.serving import Served
from tests.support.streams import drain
from tests.support.waiting import wait_until
from worker.admin import catalogues, notices, webhooks

USER, METER = "user-42", "premium_voice"


def signed_in(served: Served, role: str) -> Person:
    person = Person(served.port)
    assert person.sign_in(served.secrets[role]).status == 200
    return person


@pytest.fixture
def person(served: Served) -> Person:
    """An operator who has signed in."""
    return signed_in(served, "operator")


# ---------------------------------------------------------------------------------------------------------------------
# Notices and webhooks


@pytest.fixture
def told(settings: Settings, served: Served) -> str:
    """The id of a notice about an account that is used up."""
    with worker_resources(settings) as resources:
        resources.claim()
        give_account(settings, USER, "basic", buckets={METER: (99_000, 0, 0)})
        notices.set_rules(resources, USER, [{"meter": METER, "kind": "balance.depleted"}], actor="tests")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 2_000})
    drain(settings, USER)
    with worker_resources(settings) as resources:
        (found,) = notices.latest(resources, kinds=["balance.depleted"])
        return found.notice_id


def test_notices_are_listed_by_kind_and_account(served: Served, told: str) -> None:
    person = signed_in(served, "support")
    page = person.get("/console/notices")
    assert (page.status, "balance.depleted" in page.text, USER in page.links, told in page.links) == (
        200, True, True, True,
    )  # fmt: skip
    assert "Webhooks" not in page.text
    assert "Nothing was told" in person.get("/console/notices?kind=partition.paused").text
    assert "Nothing was told" in person.get("/console/notices?user=user-43").text
    assert told in person.get(f"/console/notices?user={USER}&kind=balance.depleted").links
    wrong = person.get("/console/notices?kind=balance.sad")
    assert (wrong.status, all(kind in wrong.text for kind in KINDS)) == (422, True)
    shown = person.get(page.links[told])
    assert (shown.status, '"meter": "premium_voice"' in shown.text, "Deliveries" in shown.text) == (200, True, False)
    assert person.get("/console/notice?id=nt_no").status == 422
    assert person.get("/console/webhooks").status == 403


def test_a_webhook_is_tested_and_what_was_given_up_is_sent_again(person: Person, told: str, settings: Settings) -> None:
    assert "There is none" in person.get("/console/webhooks").text
    with worker_resources(settings) as resources:
        added = webhooks.add(resources, "https://example.com/meterfall", by="ops")
    page = person.get("/console/webhooks")
    assert added.webhook_id in page.text
    assert "https://example.com/meterfall" in page.text
    assert added.secret not in page.html
    test = next(each for each in page.forms if each.fields.get("do") == "test")
    shown = person.send(test)
    assert (shown.status, "webhook.test" in shown.text, "waiting" in shown.text) == (200, True, True)
    # A dyno gives it up.
    given_up = "state = 'dead', attempts = 10, error = 'status 500', next_at = NULL, ended_at = now()"
    execute(settings, f"UPDATE notice_delivery SET {given_up}")
    page = person.get("/console/webhooks")
    assert "status 500" in page.text
    again = person.send(next(each for each in page.forms if each.fields.get("do") == "replay"))
    assert "1 delivery will be sent again" in again.text
    assert rows(settings, "SELECT state FROM notice_delivery") == [("waiting",)]
    assert person.send(test, do="forget").status == 422
    assert person.send(test, webhook="wh_no").status == 422


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue


def upload(person: Person, page: Page, file: bytes, **fields: str) -> Page:
    """Send the form of the catalogue with a file, as a browser does."""
    form = page.form("/console/catalogue")
    parts: Mapping[str, str] = {name: text for name, text in (form.fields | fields).items() if name != "file"}
    body = b"".join(
        f'--cut\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in parts.items()
    )
    body += (
        b'--cut\r\nContent-Disposition: form-data; name="file"; filename="c.toml"\r\n\r\n' + file + b"\r\n--cut--\r\n"
    )
    return person.ask("POST", form.action, body=body, headers={"Content-Type": "multipart/form-data; boundary=cut"})


@pytest.fixture
def cheaper(tmp_path: Path) -> bytes:
    """A catalogue with half of the allowance of a plan."""
    path = edited_catalogue(tmp_path, ("quantity = 100_000", "quantity = 1_000"))
    return path.read_bytes()


def test_an_uploaded_catalogue_is_compared_and_tried(
    person: Person, served: Served, settings: Settings, cheaper: bytes
) -> None:
    give_account(settings, USER, "basic")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    drain(settings, USER)
    before = rows(settings, "SELECT count(*) FROM catalogue_version")
    page = person.get("/console/catalogue")
    assert (page.status, "in force" in page.text) == (200, True)
    tried = upload(person, page, cheaper, user=USER)
    assert tried.status == 200, tried.text
    assert "allowance 100,000 1,000 1" in tried.text
    assert "1 event of 1 account" in tried.text
    assert "allowance: 1,500 → 1,000 (−500)" in tried.text
    assert USER in tried.links
    sampled = upload(person, page, cheaper, sample="10", days="7")
    assert "1 event of 1 account" in sampled.text
    assert rows(settings, "SELECT count(*) FROM catalogue_version") == before


def test_what_is_no_catalogue_is_refused_by_name(
    person: Person, served: Served, settings: Settings, cheaper: bytes
) -> None:
    page = person.get("/console/catalogue")
    for file, fields, words in (
        (b"plans = 1", {}, "file: meters: Field required"),
        (b"\xff\xfe", {}, "file: must be text in UTF-8"),
        (cheaper, {"days": "93"}, "days: must be a whole number from 1 to 92"),
        (cheaper, {"sample": "x"}, "sample: must be a whole number"),
        (cheaper, {"old": "basic"}, "new: name both plans"),
        (cheaper, {"token": "no"}, "not from a page of your session"),
    ):
        refused = upload(person, page, file, **fields)
        assert (refused.status in {403, 422}, words in refused.text) == (True, True), refused.text
    unknown = upload(person, page, cheaper, old="basic", new="nothing")
    assert (unknown.status, "nothing" in unknown.text) == (200, True)
    plain = person.ask("POST", "/console/catalogue", {"token": page.form("/console/catalogue").fields["token"]})
    assert plain.status == 415
    assert signed_in(served, "support").get("/console/catalogue").status == 403
    # A plan that accounts are on is missing: it says so, and shows the differences.
    give_account(settings, USER, "basic")
    with worker_resources(settings) as resources:
        resources.claim()
        lacking = catalogues.history(resources)[-1].content.replace("[plans.basic]", "[plans.common]", 1)
    said = upload(person, page, lacking.encode())
    assert (said.status, "It could not be applied" in said.text, "basic" in said.text) == (200, True, True)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def test_an_operator_runs_a_proof(person: Person, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    drain(settings, USER)
    page = person.get("/console/proof")
    assert "None has ended yet" in page.text

    def run() -> Page:
        person.send(person.get("/console/proof").form("/console/proof"))
        wait_until(lambda: "so far" not in person.get("/console/proof").text, "it ends", 60)
        return person.get("/console/proof")

    assert "Clean" in run().text
    execute(settings, "ALTER TABLE balance DISABLE TRIGGER USER")
    execute(settings, "UPDATE balance SET used = used + 1 WHERE meter = %s", METER)
    execute(settings, "ALTER TABLE balance ENABLE TRIGGER USER")
    found = run().text
    assert ("difference" in found, METER in found) == (True, True), found
    assert USER not in found, "it has the name of the logs"
    # A support person reads it, and runs none.
    support = signed_in(served, "support")
    seen = support.get("/console/proof")
    assert ("difference" in seen.text, [each.action for each in seen.forms]) == (True, ["/console/sign-out"])
    refused = support.ask("POST", "/console/proof", {**seen.forms[0].fields, "do": "run"})
    assert refused.status == 403
    assert json.dumps(served.secrets["support"]) not in refused.html
