"""The commands about plans and accounts."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path

from config.catalogue import load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings
from tests.support.commands import METER, USER, Meterfall, assert_all_refused, assert_refused, lines_of
from tests.support.ledger import move_clock, rows
from tests.support.paths import ROOT
from tests.support.streams import drain


def test_plans_lists_what_the_catalogue_says(bare: Meterfall) -> None:
    listed = bare.done("plans", "--json")
    catalogue = load_catalogue(DEFAULT_CATALOGUE)
    assert {(row["plan"], row["meter"]) for row in listed} == {
        (code, meter) for code, plan in catalogue.plans.items() for meter in plan.meters
    }
    (basic,) = [row for row in listed if (row["plan"], row["meter"]) == ("basic", METER)]
    assert basic == {
        "plan": "basic", "tier": 1, "month_cents": 900, "year_cents": 9_000, "meter": METER, "quantity": 100_000,
        "cadence": "subscription", "rollover_cap": 1_000_000,
    }  # fmt: skip
    assert [row["quantity"] for row in listed if row["plan"] == "max_relay"] == ["unlimited"]
    table = bare.done("plans")
    assert [code for code in catalogue.plans if code not in table] == []


def test_an_account_is_opened_granted_shown_and_changed(meterfall: Meterfall) -> None:
    bounds = ["--period-start", "2026-11-01T00:00:00Z", "--period-end", "2036-12-01T00:00:00+01:00"]
    opened = meterfall.done("account", "open", USER, "basic", "--status", "past_due", *bounds, "--json")
    assert (opened["user_id"], opened["plan"], opened["status"], opened["trust"]) == (USER, "basic", "past_due", "new")
    assert set(opened["balances"]) == {"server_kokoro", METER, "ocr_tokens"}
    voice = opened["balances"][METER]
    assert (voice["allowance"], voice["used"], voice["rollover"], voice["purchased"]) == (100_000, 0, 0, 0)
    assert (voice["period_start"], voice["period_end"]) == ("2026-11-01T00:00:00+00:00", "2036-11-30T23:00:00+00:00")
    grant = ["account", "grant", USER, METER]
    granted = meterfall.done(*grant, "250", "--key", "order-1", "--json")
    assert (granted["balances"][METER]["purchased"], granted["version"]) == (250, opened["version"] + 1)
    assert meterfall.done(*grant, "250", "--key", "order-1", "--json") == {**granted, "repeated": True}
    assert_refused(meterfall(*grant, "251", "--key", "order-1"), 1, "key", "order-1", "250")
    changed = meterfall.done("account", "set-status", USER, "unpaid", "--json")
    assert (changed["status"], changed["version"]) == ("unpaid", granted["version"] + 1)
    shown = meterfall.done("account", "show", USER, "--json")
    name = shown.pop("name_in_logs")
    assert {name: changed[name] for name in shown} == shown
    more = {name for name in changed.keys() - shown.keys() if changed[name]}
    assert more == {"waits_for_events"}, "nothing more is to be told"
    table = meterfall.done("account", "show", USER)
    assert name.startswith("user:")
    assert f"in logs: {name}" in table
    assert table.startswith(f"{USER}: plan basic, unpaid")
    assert METER in table


def test_an_account_that_is_opened_again_alike_is_a_repeat(settings: Settings, meterfall: Meterfall) -> None:
    opening = ["account", "open", USER, "basic", "--period-end", "2036-12-01T00:00:00Z"]
    first = meterfall.done(*opening, "--json")
    before = rows(settings, "SELECT * FROM ledger_entry ORDER BY seq")
    assert meterfall.done(*opening, "--json") == {**first, "repeated": True}
    assert meterfall.done(*opening).startswith(f"done before; nothing changed\n{USER}: plan basic, active")
    assert_refused(meterfall(*opening[:-1], "2036-12-02T00:00:00Z"), 2, "user_id", USER, "already")
    assert rows(settings, "SELECT * FROM ledger_entry ORDER BY seq") == before


def test_an_account_command_that_cannot_be_carried_out_names_the_field(
    settings: Settings, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    before = rows(settings, "SELECT * FROM ledger_entry ORDER BY seq")
    opening, grant = ["account", "open", "user-9"], ["account", "grant", USER]
    ids = ["user_id", "1 to 128 characters"]
    assert_all_refused(
        meterfall,
        [
            (["account", "open", USER, "plus"], {}, ["user_id", USER, "already"]),
            ([*opening, "gold"], {}, ["plan", "gold", "basic"]),
            ([*opening, "basic", "--status", "gone"], {}, ["status", "trialing"]),
            ([*opening, "basic", "--period-end", "2020-01-01T00:00:00Z"], {}, ["period_end", "after"]),
            ([*opening, "basic", "--period-start", "0001-01-01T00:00:00+14:00"], {}, ["--period-start"]),
            ([*opening, "free", "--period-start", "9999-12-31T00:00:00Z"], {}, ["period_start", "9999"]),
            ([*opening, "tenant", "--period-start", "9999-12-01T00:00:00Z"], {}, ["period_start", "9999"]),
            (["account", "renew", USER, "i", "9999-12-01T00:00:00Z", "9999-12-31T00:00:00Z"], {}, ["period_start"]),
            (["account", "open", "two words", "basic"], {}, ids),
            (["account", "open", 'a","b', "basic"], {}, ids),
            (["account", "open", 'a"b', "basic"], {}, ids),
            (["account", "open", "é", "basic"], {}, ids),
            (["account", "open", "x" * 129, "basic"], {}, ids),
            (["account", "open", "", "basic"], {}, ids),
            (["account", "show", "user-9"], {}, ["user_id", "user-9"]),
            (["account", "show", 'a"b'], {}, ["user_id"]),
            (["account", "set-status", USER, "gone"], {}, ["status", "past_due"]),
            (["account", "set-status", 'a"b', "active"], {}, ["user_id"]),
            (["account", "set-status", "user-9", "active"], {}, ["user_id", "user-9"]),
            (
                ["account", "change-plan", USER, "plus", "--at", "period_end", "--period-end", "2036-01-01T00:00:00Z"],
                {},
                ["--period-end", "--at now"],
            ),
            ([*grant, METER, "0", "--key", "k"], {}, ["amount", "1"]),
            ([*grant, METER, "1000000000001", "--key", "k"], {}, ["amount", "1000000000000"]),
            ([*grant, "voice", "5", "--key", "k"], {}, ["meter", "premium_voice"]),
            ([*grant, "relay_credits", "5", "--key", "k"], {}, ["meter", "relay_credits"]),
            ([*grant, METER, "5", "--key", ""], {}, ["key", "1 to 128 characters"]),
            (["account", "grant", 'a"b', METER, "5", "--key", "k"], {}, ["user_id"]),
        ],
    )
    assert rows(settings, "SELECT * FROM ledger_entry ORDER BY seq") == before
    assert rows(settings, "SELECT user_id FROM account") == [(USER,)]


def test_accounts_are_exported_and_imported(meterfall: Meterfall, tmp_path: Path) -> None:
    meterfall.done("account", "open", USER, "basic")
    meterfall.done("account", "open", "user-9", "tenant")
    folder = tmp_path / "out"
    folder.mkdir()
    file = folder / "accounts.jsonl"
    assert meterfall.done("account", "export", str(file)) == f"2 accounts written to {file}\n"
    assert list(folder.iterdir()) == [file]
    text = file.read_text(encoding="utf-8")
    assert meterfall.done("account", "export") == meterfall.done("account", "export", "-") == text

    first, second = text.splitlines()
    wrong = second.replace('"used":0', '"used":"[/x]"').replace("user-9", "user-10")
    file.write_text("\n".join([first.replace(USER, "user-11"), wrong, second]), encoding="utf-8")
    missing = str(folder / "none" / "file")
    assert_all_refused(
        meterfall,
        [
            (
                ["account", "import", str(file)],
                {},
                ["row 2: meters.credits.used: must be", "[/x]", "and 1 more bad row"],
            ),
            (["account", "import", missing], {}, ["file", "No such file"]),
            (["account", "export", missing], {}, ["file", "No such file"]),
        ],
    )
    listed = meterfall.done("account", "import", str(file), "--skip-bad", "--json")
    assert listed["accounts"] == 1
    assert [(bad["row"], bad["user_id"], bad["field"]) for bad in listed["bad"]] == [
        (2, "user-10", "meters.credits.used"),
        (3, "user-9", "user_id"),
    ]
    nothing = meterfall("account", "import", "-", "--skip-bad", stdin=wrong)
    assert (nothing.code, nothing.err) == (1, "")
    assert "must be a valid integer (got '[/x]')" in nothing.out
    assert nothing.out.endswith("0 accounts imported, 1 bad row skipped\n")
    assert meterfall("account", "import", "-", "--skip-bad", "--json", stdin=wrong).code == 1
    relay = json.dumps({"rows": {"i1": {"tier_snapshot": "max"}}})
    assert meterfall.done("account", "import", "-", stdin=relay) == "1 account imported\n"
    assert meterfall.done("account", "show", "i1", "--json")["plan"] == "max_relay"
    meterfall.done("verify")


# How to make each change, and the kind of an entry that it makes.
CHANGES = {
    "open": ["account", "open", "new", "basic"],
    "set_status": ["account", "set-status", USER, "past_due"],
    "set_trust": ["account", "set-trust", USER, "trusted"],
    "change_plan": ["account", "change-plan", USER, "plus"],
    "waits": ["account", "renew", USER, "in-2", "2036-12-01T00:00:00Z", "2037-01-01T00:00:00Z"],
    "renewal": ["account", "renew", USER, "in-1", datetime.now(UTC).isoformat(), "2036-12-01T00:00:00Z"],
    "set_period": ["account", "set-period", USER, "2036-11-30T00:00:00Z", "--key", "p1"],
    "grant": ["account", "grant", USER, METER, "5", "--key", "o1"],
    "clawback": ["account", "clawback", USER, METER, "5", "--key", "r1", "--order", "o1"],
    "adjust": ["account", "adjust", USER, "credits", "--rollover", "-5", "--key", "a1"],
    "forgive_debt": ["account", "forgive-debt", USER, "credits", "2", "--key", "f1"],
    "undo": ["account", "undo", USER, "adjust:a1"],
    "transfer_in": ["account", "carry-over", USER, "other", "--key", "t1", "--meter", METER],
    "reversal": ["reverse", USER, "e1"],
    "open_meter": ["account", "seed", "seeded", "--plan", "tenant"],
    "close": ["account", "close", "new", "--yes"],
}


def test_every_change_takes_who_and_why(settings: Settings, meterfall: Meterfall) -> None:
    for user in (USER, "other"):
        meterfall.done("account", "open", user, "basic", "--by", "shop")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "e1"}))
    drain(settings, USER)
    for kind, arguments in CHANGES.items():
        meterfall.done(*arguments, "--by", "alice", "--reason", f"why {kind}")
        drain(settings, USER)  # a change of the plan waits for older entries
        query = "SELECT DISTINCT actor FROM ledger_entry WHERE kind = %s AND reason = %s"
        assert rows(settings, query, kind, f"why {kind}") == [("alice",)], kind
    exported = meterfall("account", "export").out
    meterfall.done("account", "close", USER, "--yes", "--forfeit")
    settled = [json.loads(line) for line in exported.splitlines()]
    moved = "".join(json.dumps({**line, "user_id": "moved"}) + "\n" for line in settled if line["user_id"] == "other")
    meterfall.done("account", "import", "-", "--by", "bob", "--reason", "from staging", stdin=moved)
    opening = "FROM ledger_entry JOIN account USING (user_id) WHERE user_id = 'moved' AND kind = 'open'"
    assert rows(settings, f"SELECT actor, reason, opened_by {opening}") == [("bob", "from staging", "shop")]


def test_who_is_the_login_unless_it_is_said(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    grant = ["account", "grant", USER, METER, "5", "--key"]
    meterfall.done(*grant, "o1", LOGNAME="carol")
    meterfall.done(*grant, "o2", "--by", "dave", LOGNAME="carol")
    meterfall.done(*grant, "o2", "--by", "erin", "--reason", "again")
    found = "SELECT actor, reason FROM ledger_entry WHERE kind = 'grant' ORDER BY seq"
    assert rows(settings, found) == [("carol", None), ("dave", None)]


def test_the_timeline_and_an_explanation_show_who_and_why(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic", "--by", "alice", "--reason", "first invoice")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "e1"}))
    drain(settings, USER)
    meterfall.done("reverse", USER, "e1", "--by", "bob", "--reason", "a voice failed")
    changes = meterfall.done("usage", USER, "--timeline", "--json")["changes"]
    assert [(each["kind"], each["actor"], each["reason"]) for each in changes[:2]] == [
        ("reversal", "bob", "a voice failed"), ("usage", None, None)
    ]  # fmt: skip
    assert (changes[-1]["actor"], changes[-1]["reason"]) == ("alice", "first invoice")
    table = meterfall.done("usage", USER, "--timeline")
    assert [word in table for word in ("by", "reason", "alice", "first invoice", "bob", "a voice failed")] == [True] * 6
    assert "by bob: a voice failed." in meterfall.done("explain", USER, "e1")
    explained = meterfall.done("explain", USER, "e1", "--json")
    assert (explained["reversed_by"], explained["reversed_reason"]) == ("bob", "a voice failed")


def test_a_bad_actor_or_reason_is_named(meterfall: Meterfall) -> None:
    grant = ["account", "grant", USER, METER, "5", "--key", "o1", "--open", "basic"]
    assert_all_refused(
        meterfall,
        [
            ([*grant, "--by", ""], {}, ["actor", "1 to 256 printable"]),
            ([*grant, "--reason", "x" * 257], {}, ["reason", "1 to 256 printable"]),
            ([*grant, "--reason", "two\nlines"], {}, ["reason", "1 to 256 printable"]),
        ],
    )
    assert_refused(meterfall("account", "show", USER), 2, "no account")


def test_an_account_has_a_time_zone(meterfall: Meterfall) -> None:
    opened = meterfall("account", "open", "user-1", "free", "--timezone", "America/New_York", "--json")
    assert '"timezone": "America/New_York"' in opened.out
    changed = meterfall("account", "set-timezone", "user-1", "plan", "--json")
    assert '"timezone": null' in changed.out


def test_limits_are_set_listed_enforced_and_removed(settings: Settings, meterfall: Meterfall) -> None:
    meterfall("account", "open", USER, "basic")
    limit = ["account", "set-limit", USER, METER]
    changed = meterfall(*limit, "--per", "day", "20", "--of", "user", "--key", "t-1", "--by", "ann", "--json")
    assert changed.json["balances"][METER]["limits"]["amounts"] == {"user": {"day": 20}}
    assert meterfall(*limit, "20", "--of", "user", "--key", "t-1", "--json").json["repeated"] is True
    assert meterfall(*limit, "900", "--per", "week").code == 0
    drain(settings, USER)
    (day, week) = meterfall("account", "limits", USER, "--json").json["limits"]
    assert (day["per"], day["set_by"], day["amount"], day["used"], day["left"]) == ("day", "user", 20, 0, 20)
    assert (week["per"], week["set_by"], week["amount"]) == ("week", "operator", 900)
    denied = meterfall("check", USER, METER, "21", "--json")
    assert (denied.code, denied.json["reason"], denied.json["limited_by"]["set_by"]) == (
        1, "spending_limit_reached", "user",
    )  # fmt: skip
    assert "does not fit into the limit of the user, 20 per day. Of it there are 0 used" in denied.json["explanation"]
    assert_refused(meterfall("charge", USER, METER, "21", "e1"), 1, "spending_limit_reached", "20 per day")
    change = meterfall("usage", USER, "--timeline", "--json").json["changes"][1]
    assert (change["kind"], change["what"], change["actor"]) == ("set_limit", "limit:t-1", "ann")
    assert meterfall(*limit, "--of", "user", "--remove").code == 0
    assert meterfall("account", "set-pay-from", USER, "allowance", "--json").json["pay_from"] == "allowance"
    shown = meterfall("account", "limits", USER)
    assert "pays from: allowance" in shown.out
    assert "week" in shown.out
    assert_all_refused(
        meterfall,
        [
            (limit, {}, ["amount", "--remove"]),
            ([*limit, "5", "--remove"], {}, ["amount", "--remove"]),
            ([*limit, "0"], {}, ["amount", "from 1 to"]),
            ([*limit, "5", "--per", "year"], {}, ["per", "day, week, month"]),
            ([*limit, "5", "--of", "plan"], {}, ["of", "operator, user"]),
            (["account", "set-pay-from", USER, "credits"], {}, ["pay_from", "allowance or all"]),
            (["account", "limits", "nobody"], {}, ["no account nobody"]),
        ],
    )


def test_the_commands_of_the_readme_work_in_their_order(settings: Settings, meterfall: Meterfall) -> None:
    """Each works after those before it, while a worker applies what comes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("## Accounts that live for years") :].split("```")[1]
    commands = [line.removeprefix("$ meterfall ") for line in block.splitlines() if line.startswith("$ meterfall ")]
    assert len(commands) > 20
    move_clock(settings, datetime(2026, 11, 30, 12, tzinfo=UTC) - datetime.now(UTC))  # the days that it names
    for command in commands:
        done = meterfall(*shlex.split(command, comments=True))
        assert (done.code, done.err) == (0, ""), f"{command}: {done}"
        for user in (USER, "user-43"):
            drain(settings, user)
