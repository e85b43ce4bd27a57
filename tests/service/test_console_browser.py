"""The console in a real browser, whose content policy is in force. Screenshots of its pages are in out/console/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from config.settings import Settings
from tests.support.browser import chromium
from tests.support.catalogues import edited_catalogue
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.serving import Served
from tests.support.streams import drain, partition_of
from worker.admin import notices, webhooks
from worker.service.console.app import PAGES

pytestmark = pytest.mark.once
USER, METER = "user-42", "premium_voice"
SHOTS = ROOT / "out" / "console"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the module."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """A new window; the test fails if the browser complains about a page."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{served.port}", viewport={"width": 1200, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert [each for each in complaints if "favicon" not in each and "404" not in each] == []


def shot(page: Page, name: str) -> None:
    """Keep a picture of the whole page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def sign_in(page: Page, served: Served, role: str = "support") -> None:
    page.goto("/console")
    page.get_by_label("API key").fill(served.secrets[role])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()


def test_a_support_person_grants_units(page: Page, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic", buckets={METER: (60_000, 5_000, 0), "server_kokoro": (0, -250, 0)})
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    drain(settings, USER)
    served.post("/v1/holds", {"user_id": USER, "meter": METER, "amount": 700, "key": "job-9"})
    page.goto("/console")
    shot(page, "sign-in")
    sign_in(page, served)
    shot(page, "overview")

    page.get_by_role("link", name="Accounts").click()
    shot(page, "accounts")
    page.get_by_label("Id, its beginning").fill("user-")
    page.keyboard.press("Enter")
    page.get_by_role("link", name=USER).click()
    expect(page.get_by_role("heading", name=USER)).to_be_visible()

    page.get_by_role("link", name="Grant units").click()
    page.get_by_label("Meter").select_option(METER)
    page.get_by_label("Units").fill("5,000")
    page.get_by_label("Order").fill("order-9")
    page.get_by_label("Reason").fill("sorry for the outage")
    shot(page, "grant")
    page.get_by_role("button", name="Preview").click()
    expect(page.get_by_text("Nothing has changed yet")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="purchased")).to_contain_text("→ 5,000")
    shot(page, "preview")
    assert rows(settings, "SELECT count(*) FROM ledger_entry WHERE entry_key = 'grant:order-9'") == [(0,)]

    page.get_by_role("button", name="Confirm").click()
    expect(page.get_by_role("status")).to_contain_text("Grant units: done")
    expect(page.get_by_role("row").filter(has_text="grant:order-9")).to_contain_text(
        "the-support: sorry for the outage"
    )
    expect(page.get_by_role("img", name="purchased: 5,000")).to_be_visible()
    shot(page, "account")

    page.get_by_role("link", name="e-1", exact=True).first.click()
    expect(page.get_by_role("heading", name="Event e-1")).to_be_visible()
    shot(page, "event")
    page.get_by_role("link", name="Reverse this event").click()
    page.get_by_label("Reason").fill("twice by mistake")
    page.get_by_role("button", name="Preview").click()
    page.get_by_role("button", name="Confirm").click()
    expect(page.get_by_role("status")).to_contain_text("Reverse an event: done")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_an_operator_replays_a_dead_letter_and_reads_reports(page: Page, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    with worker_resources(settings) as resources:
        text = f'{{"event_id": "e-2", "user_id": "{USER}", "meter": "{METER}", "quantity": 1, "colour": "red"}}'
        resources.redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": text})
    drain(settings, USER)
    sign_in(page, served, "operator")
    page.get_by_role("link", name="Dead letters").click()
    expect(page.get_by_text("unknown field").first).to_be_visible()
    shot(page, "dead-letters")
    page.get_by_role("table").last.get_by_role("link").first.click()
    expect(page.get_by_text('"colour": "red"')).to_be_visible()
    shot(page, "dead-letter")
    page.get_by_role("link", name="Replay").click()
    page.get_by_label("Why").fill("the workers are mended")
    page.get_by_role("button", name="Replay 1 dead letter").click()
    expect(page.get_by_role("status")).to_contain_text("replayed: 1")
    assert rows(settings, "SELECT state, resolved_by FROM dead_letter") == [("replayed", "the-operator")]

    page.get_by_role("link", name="Reports").click()
    expect(page.get_by_role("img", name="premium_voice by day")).to_be_visible()
    shot(page, "reports")


def test_the_style_is_applied_in_dark_and_light_and_on_a_phone(page: Page, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic", buckets={METER: (60_000, 5_000, 0)})
    sign_in(page, served)
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
    page.goto(f"/console/account?user_id={USER}")
    shot(page, "account-dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, "account-phone")


def test_the_keyboard_is_enough(page: Page, served: Served) -> None:
    page.goto("/console")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(served.secrets["operator"])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Accounts")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Accounts")).to_be_visible()


# ---------------------------------------------------------------------------------------------------------------------
# Notices, catalogues, proofs


def test_an_operator_tests_a_webhook_tries_a_catalogue_and_runs_a_proof(
    page: Page, served: Served, settings: Settings, tmp_path: Path
) -> None:
    with worker_resources(settings) as resources:
        resources.claim()
        give_account(settings, USER, "basic", buckets={METER: (99_000, 0, 0)})
        notices.set_rules(resources, USER, [{"meter": METER, "kind": "balance.depleted"}], actor="tests")
        webhooks.add(resources, "https://example.com/meterfall", by="ops")
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    drain(settings, USER)
    sign_in(page, served, "operator")
    page.get_by_role("link", name="Notices").click()
    page.get_by_label("Kind").select_option("balance.depleted")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("link", name=USER)).to_be_visible()
    shot(page, "notices")
    page.get_by_role("link", name="Webhooks").click()
    page.get_by_role("button", name="Send a test").click()
    expect(page.get_by_role("heading", name="webhook.test")).to_be_visible()
    shot(page, "notice")
    page.get_by_role("link", name="All webhooks").click()
    shot(page, "webhooks")

    page.get_by_role("link", name="Catalogue").click()
    file = edited_catalogue(tmp_path, ("quantity = 100_000", "quantity = 1_000"))
    page.get_by_label("A catalogue to try").set_input_files(file)
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_text("1 event of 1 account")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text=USER)).to_contain_text("allowance: 1,000 → 0")
    shot(page, "catalogue")

    page.get_by_role("link", name="Proof").click()
    page.get_by_role("button", name="Run a proof now").click()
    expect(page.get_by_text("Clean")).to_be_visible(timeout=60_000)
    shot(page, "proof")


_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]}
_SCREENS: tuple[tuple[Literal["light", "dark"], int], ...] = (("light", 1200), ("dark", 360))


def test_every_page_is_accessible(page: Page, served: Served, settings: Settings) -> None:
    """By the rules of axe for WCAG 2.2 A and AA: dark and light, on a desk and on a phone."""
    give_account(settings, USER, "basic", buckets={METER: (60_000, 5_000, 0), "server_kokoro": (0, -250, 0)})
    served.post("/v1/events", {"event_id": "e-1", "user_id": USER, "meter": METER, "quantity": 1_500})
    with worker_resources(settings) as resources:
        resources.claim()
        resources.redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": "no JSON"})
        told = webhooks.send_test(resources, webhooks.add(resources, "https://example.com/", by="ops").webhook_id)
    drain(settings, USER)
    served.post("/v1/holds", {"user_id": USER, "meter": METER, "amount": 700, "key": "job-9"})
    ((letter,),) = rows(settings, "SELECT id FROM dead_letter")
    axe, found = Axe(), list[str]()

    def look(path: str) -> None:
        for scheme, width in _SCREENS:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            answer = page.goto(f"/console{path}")
            assert answer is not None
            assert answer.status == 200, path
            for each in axe.run(page, options=_RULES).response["violations"]:
                found.append(f"{path}, {scheme}: {each['id']} {[node['html'] for node in each['nodes']][:3]}")

    look("/sign-in")
    sign_in(page, served, "operator")
    of_account, of_event = f"?user_id={USER}", f"?user_id={USER}&event_id=e-1"
    queries = {
        "/account": of_account, "/event": of_event, "/account/reverse": of_event,
        "/account/release-hold": f"{of_account}&meter={METER}&hold=job-9",
        "/dead-letter": f"?id={letter}", "/dead-letters/resolve": f"?do=drop&id={letter}",
        "/notice": f"?id={told}",
    }  # fmt: skip
    look("/")
    for each in PAGES:
        if each.path != "/reports.csv":
            look(each.path + queries.get(each.path, of_account if each.path.startswith("/account/") else ""))
    assert found == []
