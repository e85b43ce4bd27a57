"""The commands that report."""

from __future__ import annotations

from config.settings import Settings
from schemas.answers import (
    Parts,
)
from schemas.reports import Breakdown, Engagement, Explanation, Timeline, UsageSummary
from tests.support.commands import METER, USER, Case, Meterfall, assert_all_refused, lines_of
from tests.support.streams import drain


def test_usage_is_reported_in_tables_and_as_json(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("account", "open", "relay-1", "max_relay")
    facts = {"voice_slug": "narrator", "document_id": "d1", "page_idx": 1}
    sent = [
        {"user_id": USER, "event_id": f"e{number}", "meter": METER, "quantity": 100, "dimensions": facts}
        for number in range(3)
    ]
    meterfall.done("emit", "-", stdin=lines_of(*sent))
    drain(settings, USER)

    summary = UsageSummary.model_validate_json(meterfall("usage", USER, "--json").out)
    (meter,) = [each for each in summary.meters if each.meter == METER]
    assert (meter.limit, meter.used, meter.available) == (100_000, 300, 99_700)
    broken = Breakdown.model_validate_json(meterfall("usage", USER, "--breakdown", "--json").out)
    assert [(voice.voice, voice.events, voice.amount) for voice in broken.voices] == [("narrator", 3, 300)]
    assert [(document.document_id, document.pages) for document in broken.documents] == [("d1", 1)]
    life = Engagement.model_validate_json(meterfall("usage", USER, "--engagement", "--json").out)
    assert (life.characters, life.syntheses, life.documents, life.pages) == (300, 3, 1, 1)
    page = Timeline.model_validate_json(meterfall("usage", USER, "--timeline", "--limit", "2", "--json").out)
    assert [change.what for change in page.changes] == ["e2", "e1"]
    older = meterfall("usage", USER, "--timeline", "--limit", "1", "--before-seq", str(page.more_before_seq))
    assert "e0" in older.out
    assert older.err == "older changes: --before-seq 5\n"

    for options, shown in (
        ([], ["Basic (basic), active", "99,700"]),
        (["--breakdown"], ["narrator", "d1"]),
        (["--engagement"], ["syntheses", "narrator"]),
        (["--timeline"], ["open_meter", "from_subscription 100"]),
    ):
        table = meterfall.done("usage", USER, *options)
        assert [word for word in shown if word not in table] == []
    listed = meterfall.done("account", "list", "--json")
    assert [each["user_id"] for each in listed] == ["relay-1", USER]
    assert meterfall.done("account", "list", "--after", USER, "--json") == []
    assert len(meterfall.done("account", "list", "--limit", "1", "--json")) == 1
    assert "unlimited" in meterfall.done("account", "list")


def test_the_timeline_says_what_became_of_plan_and_status(settings: Settings, meterfall: Meterfall) -> None:
    for command in (
        ["open", USER, "basic", "--status", "trialing", "--period-end", "2036-12-01T00:00:00Z"],
        ["set-status", USER, "active"],
        ["change-plan", USER, "free", "--at", "period_end"],
        ["set-status", USER, "canceled", "--at", "period_end"],
        ["change-plan", USER, "plus"],
        ["change-plan", USER, "max", "--at", "period_end"],
        ["set-status", USER, "active"],
        ["change-plan", USER, "plus", "--at", "period_end"],
    ):
        meterfall.done("account", *command)
        drain(settings, USER)
    table = meterfall.done("usage", USER, "--timeline")
    expected = [
        "trialing → active",
        "free from 2036-12-01 00:00:00 UTC",
        "free from 2036-12-01 00:00:00 UTC, canceled from 2036-12-01 00:00:00 UTC",
        "basic → plus",
        "allowance 300,000",
        "unlimited",
        "max from the next renewal, canceled from 2036-12-01 00:00:00 UTC",
        "stays active",
        "nothing",
    ]
    assert [words for words in expected if words not in table] == []
    closed = meterfall.done("account", "close", USER, "--yes").split()[-1]
    assert "active → closed" in meterfall.done("usage", closed, "--timeline")


def test_an_event_is_explained_in_words_and_as_json(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("emit", "-", stdin=lines_of({"user_id": USER, "event_id": "e1", "meter": METER, "quantity": 7}))
    drain(settings, USER)
    output = meterfall.done("explain", USER, "e1")
    assert output.startswith(f"Event e1 used 7 of {METER} (characters).\nThe subscription paid 7 of the 100,000 left")
    found = Explanation.model_validate_json(meterfall("explain", USER, "e1", "--json").out)
    assert found.parts == Parts(from_subscription=7)
    assert output.splitlines()[: len(found.sentences)] == list(found.sentences)


def test_a_report_that_cannot_be_made_names_the_field(meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    cases: list[Case] = [
        (["usage", "nobody"], {}, ["user_id", "nobody"]),
        (["usage", "no body", "--breakdown"], {}, ["user_id", "no body"]),
        (["usage", USER, "--breakdown", "--engagement"], {}, ["--breakdown", "--engagement"]),
        (["usage", USER, "--breakdown", "--limit", "0"], {}, ["documents", "0"]),
        (["usage", USER, "--breakdown", "--after", "d1"], {}, ["after", "meter/document"]),
        (["usage", USER, "--limit", "5"], {}, ["--limit"]),
        (["usage", USER, "--timeline", "--after", "m/d"], {}, ["--after", "--breakdown"]),
        (["usage", USER, "--before-seq", "4"], {}, ["--before-seq", "--timeline"]),
        (["usage", USER, "--timeline", "--before-seq", "0"], {}, ["before_seq", "0"]),
        (["explain", USER, "e404"], {}, ["event_id", "e404"]),
        (["account", "list", "--limit", "0"], {}, ["limit", "1"]),
    ]
    assert_all_refused(meterfall, cases)


def test_events_are_listed_page_by_page(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "e0"}, {"event_id": "e1"}, {"event_id": "e2"}))
    drain(settings, USER)
    page = meterfall.done("usage", USER, "--events", "--limit", "2", "--json")
    assert [event["event_id"] for event in page["events"]] == ["e2", "e1"]
    older = ["--before-seq", str(page["more_before_seq"])]
    rest = meterfall.done("usage", USER, "--events", *older, "--json")
    assert ([event["event_id"] for event in rest["events"]], rest["more_before_seq"]) == (["e0"], None)
    shown = meterfall("usage", USER, "--events", "--limit", "1")
    assert "e2" in shown.out
    assert shown.err.startswith("older events: --before-seq ")
