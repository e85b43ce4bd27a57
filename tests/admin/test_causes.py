"""Every change says who made it and why; the system's own changes say nothing, and nothing outlives the person."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.reports import EventState
from tests.support.ledger import move_clock, rows
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from worker.admin import accounts, corrections, credits, erasure, transfer
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.renewals import renew_due
from worker.errors import AccountError
from worker.ledger import batch
from worker.ledger.accounts import ACCOUNT_COLUMNS
from worker.ledger.columns import copy_rows
from worker.ledger.migrate import migrate
from worker.reports.explain import explain
from worker.reports.proof import verify_ledger
from worker.reports.usage import timeline
from worker.resources import Resources

USER, TRIAL, METER = "user-42", "trial-7", "premium_voice"
NOW = datetime.now(UTC)
WHO: Any = {"actor": "alice", "reason": "ticket 12: a voice failed"}
ALICE = (WHO["actor"], WHO["reason"])

# Every function that changes an account, and the kind of the entries that it makes.
CHANGES: dict[str, tuple[Callable[..., object], set[str]]] = {
    "open": (lambda own, **who: accounts.open_new(own, "new", "basic", **who), {"open", "open_meter"}),
    "open many": (lambda own, **who: accounts.open_many(own, ["n1", "n2"], "basic", **who), {"open", "open_meter"}),
    "status": (lambda own, **who: accounts.set_status(own, USER, "past_due", **who), {"set_status"}),
    "cancel": (lambda own, **who: accounts.set_status(own, USER, "canceled", at="period_end", **who), {"schedule"}),
    "trust": (lambda own, **who: accounts.set_trust(own, USER, "trusted", **who), {"set_trust"}),
    "plan": (lambda own, **who: accounts.change_plan(own, USER, "plus", **who), {"change_plan"}),
    "plan later": (lambda own, **who: accounts.change_plan(own, USER, "plus", at="period_end", **who), {"schedule"}),
    "renew": (
        lambda own, **who: accounts.renew(own, USER, "in-1", NOW, NOW + timedelta(days=31), **who),
        {"paid", "renewal"},
    ),
    "renew later": (
        lambda own, **who: accounts.renew(own, USER, "in-2", NOW + timedelta(days=30), NOW + timedelta(days=60), **who),
        {"waits"},
    ),
    "set period": (
        lambda own, **who: accounts.set_period(own, USER, NOW + timedelta(days=29), "fix-1", **who),
        {"set_period"},
    ),
    "grant": (lambda own, **who: credits.grant(own, USER, METER, 5, "o2", **who), {"grant"}),
    "grant to a new account": (
        lambda own, **who: credits.grant(own, "new", METER, 5, "o2", open_plan="basic", **who),
        {"open", "open_meter", "grant"},
    ),
    "grant on a new meter": (
        lambda own, **who: credits.grant(own, USER, "credits", 5, "o3", **who),
        {"open_meter", "grant"},
    ),
    "clawback": (lambda own, **who: credits.claw_back(own, USER, METER, 5, "r1", **who), {"clawback"}),
    "seed": (lambda own, **who: credits.seed_signup(own, "new", plan="tenant", **who), {"open", "open_meter"}),
    "carry over": (
        lambda own, **who: credits.carry_over(own, TRIAL, USER, "t1", meter=METER, **who),
        {"transfer_in", "transfer_out"},
    ),
    "adjust": (
        lambda own, **who: corrections.adjust(own, USER, METER, used=-5, key="f1", **(WHO | who)),
        {"adjust"},
    ),
    "undo": (lambda own, **who: corrections.undo(own, USER, "grant:o0", **who), {"undo"}),
    "reverse": (lambda own, **who: credits.reverse(own, USER, "e1", **who), {"reversal"}),
    "close": (lambda own, **who: close_account(own, USER, forfeit=True, **who), {"close"}),
    "reopen": (lambda own, **who: erasure.reopen(own, "gone", "basic", **who), {"open", "open_meter"}),
    "import": (lambda own, **who: transfer.import_accounts(own, line_of("new"), **who), {"open"}),
}  # fmt: skip


def line_of(user_id: str, **changes: object) -> str:
    """A line of an export of an earlier release, unless `changes` add to it."""
    line = {
        "user_id": user_id, "plan": "free", "status": "active", "trust": "new", "highest_tier": 0, "next_plan": None,
        "plan_change_at": None, "next_status": None, "status_change_at": None, "opened_at": NOW.isoformat(),
        "meters": {},
    }  # fmt: skip
    return json.dumps(line | changes) + "\n"


@pytest.fixture(autouse=True)
def _accounts(settings: Settings, resources: Resources, redis: Redis) -> Iterator[None]:
    """Two accounts, one event; whatever the test did, the books are right after it."""
    accounts.open_new(resources, USER, "basic", start=NOW, end=NOW + timedelta(days=30))
    accounts.open_new(resources, TRIAL, "basic", actor="shop")
    credits.grant(resources, TRIAL, METER, 20, "o1")
    credits.grant(resources, USER, METER, 7, "o0")
    accounts.open_new(resources, "gone", "basic")
    close_account(resources, "gone")
    with Billing.connect(settings) as billing:
        billing.emit(USER, METER, 100, event_id="e1")
    drain(settings, USER)
    yield
    assert verify_ledger(resources).differences == []


def causes(settings: Settings, since: int = 0) -> set[tuple[object, ...]]:
    """Kind, actor and reason of all entries but the first `since`."""
    found = rows(settings, "SELECT kind, actor, reason FROM ledger_entry ORDER BY created_at, user_id, seq")
    return set(found[since:])


def count(settings: Settings) -> int:
    ((number,),) = rows(settings, "SELECT count(*) FROM ledger_entry")
    assert isinstance(number, int)
    return number


# ---------------------------------------------------------------------------------------------------------------------
# What the ledger keeps


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_says_who_made_it_and_why(name: str, settings: Settings, resources: Resources) -> None:
    change, kinds = CHANGES[name]
    before = count(settings)
    change(resources, **WHO)
    assert causes(settings, before) == {(kind, *ALICE) for kind in kinds}


def test_every_function_that_changes_an_account_takes_both() -> None:
    found = {
        name: {"actor", "reason"} <= inspect.signature(function).parameters.keys()
        for module in (accounts, corrections, credits, erasure, transfer)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and name != "parse_time"
    }
    readers = {"show", "export_accounts", "count_rows"}
    assert {name for name, takes_both in found.items() if not takes_both} == readers
    assert len(found) == 20 + len(readers)


@pytest.mark.parametrize("field", ["actor", "reason"])
@pytest.mark.parametrize("value", ["", "x" * 257, "two\nlines", "nul\0", "\ud800", "esc\x1b[2J", 5])
def test_a_bad_actor_or_reason_is_named_and_changes_nothing(
    field: str, value: object, settings: Settings, resources: Resources
) -> None:
    before = count(settings)
    for change, _ in CHANGES.values():
        with pytest.raises(
            AccountError, match=rf"^{field}: must be 1 to 256 printable characters \(got .*\)$"
        ) as refused:
            change(resources, **{field: value})
        assert str(refused.value).isprintable()
    assert count(settings) == before


def test_the_longest_and_any_alphabet_fit(settings: Settings, resources: Resources) -> None:
    long = "ß" * 256
    credits.grant(resources, USER, METER, 1, "o9", actor=long, reason=long)
    assert ("grant", long, long) in causes(settings)


def test_a_repeat_keeps_the_first_actor_and_reason(settings: Settings, resources: Resources) -> None:
    first, second = {"actor": "alice", "reason": "first"}, {"actor": "bob", "reason": "second"}
    for name in (
        "grant",
        "clawback",
        "renew",
        "renew later",
        "set period",
        "carry over",
        "reverse",
        "trust",
        "seed",
        "close",
    ):
        change, _ = CHANGES[name]
        change(resources, **first)
        before = causes(settings)
        change(resources, **second)
        assert causes(settings) == before, name


def test_the_systems_own_changes_say_nothing(settings: Settings, resources: Resources, redis: Redis) -> None:
    accounts.open_new(resources, "pro", "pro", **WHO)
    accounts.set_status(resources, USER, "canceled", at="period_end", **WHO)
    before = count(settings)
    move_clock(settings, timedelta(days=32))
    # The boundary of a command belongs to the system, though the command stores it.
    accounts.set_trust(resources, "pro", "elite", **WHO)
    assert causes(settings, before) == {("refill", None, None), ("set_trust", *ALICE)}
    renew_due(resources)
    alone = {(kind, None, None) for kind in ("refill", "set_status", "lapse")}
    assert causes(settings, before) == {*alone, ("set_trust", *ALICE)}
    opening = settings.model_copy(update={"default_plan": "free"})
    with Billing.connect(opening) as billing:
        billing.emit("stranger", METER, 1)
    drain(opening, "stranger")
    assert rows(settings, "SELECT DISTINCT actor, reason FROM ledger_entry WHERE user_id = 'stranger'") == [
        (None, None)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Who sees it


def test_the_timeline_shows_it(resources: Resources) -> None:
    credits.grant(resources, USER, METER, 5, "o2", **WHO)
    newest, usage, *opened = timeline(resources, USER).changes
    assert (newest.kind, newest.actor, newest.reason) == ("grant", *ALICE)
    assert {(change.actor, change.reason) for change in (usage, *opened)} == {(None, None)}


def test_an_explanation_says_who_reversed_the_event_and_why(resources: Resources) -> None:
    assert explain(resources, USER, "e1").reversed_by is None
    credits.reverse(resources, USER, "e1", **WHO)
    found = explain(resources, USER, "e1")
    assert (found.state, found.reversed_by, found.reversed_reason) == (EventState.REVERSED, *ALICE)
    assert found.sentences[-1].endswith(" by alice: ticket 12: a voice failed.")


def test_an_export_and_an_import_keep_who_opened_an_account(
    settings: Settings, resources: Resources, database_url: str, redis_url: str
) -> None:
    accounts.open_new(resources, "new", "free", **WHO)
    lines: list[str] = []
    transfer.export_accounts(resources, lines.append)
    opened = {
        line["user_id"]: (line["opened_by"], line["opened_reason"])
        for line in map(json.loads, "".join(lines).splitlines())
    }
    assert opened == {USER: (None, None), TRIAL: ("shop", None), "new": ALICE}
    elsewhere = settings_for(database_url, redis_url)
    with worker_resources(elsewhere) as there:
        transfer.import_accounts(there, "".join(lines), actor="bob", reason="moved")
        again: list[str] = []
        transfer.export_accounts(there, again.append)
        assert again == lines
        assert verify_ledger(there).differences == []
    assert causes(elsewhere) == {("open", "bob", "moved"), ("open_meter", "bob", "moved")}


def test_an_export_of_an_earlier_release_is_imported(settings: Settings, resources: Resources) -> None:
    assert transfer.import_accounts(resources, line_of("old"), **WHO).accounts == 1
    found = (
        "SELECT actor, opened_by, opened_reason FROM ledger_entry JOIN account USING (user_id) WHERE user_id = 'old'"
    )
    assert rows(settings, found) == [("alice", None, None)]


# ---------------------------------------------------------------------------------------------------------------------
# What is erased


def test_closing_erases_reasons_and_the_users_own_name(settings: Settings, resources: Resources) -> None:
    transfer.import_accounts(
        resources,
        line_of("jane", opened_by="jane", opened_reason="jane signed up"),
        actor="bob",
        reason="from jane's old ledger",
    )
    accounts.set_trust(resources, "jane", "trusted", actor="jane", reason="Jane Doe asked")
    closed = close_account(resources, "jane", actor="carol", reason="request 7")
    found = rows(settings, "SELECT kind, actor, reason FROM ledger_entry WHERE user_id = %s ORDER BY seq", closed)
    assert found == [("open", "bob", None), ("set_trust", None, None), ("close", "carol", "request 7")]
    for table in ("ledger_entry", "account"):
        assert rows(settings, f"SELECT 1 FROM {table} WHERE {table}::text ILIKE %s", "%jane%") == []


def test_a_reason_for_closing_that_names_the_user_is_erased(settings: Settings, resources: Resources) -> None:
    closed = close_account(resources, USER, forfeit=True, actor=USER, reason=f"{USER} leaves")
    found = rows(settings, "SELECT DISTINCT actor, reason FROM ledger_entry WHERE user_id = %s", closed)
    assert found == [(None, None)]


# ---------------------------------------------------------------------------------------------------------------------
# Rolling deploys

OLD_COLUMNS = (
    "user_id, seq, entry_key, meter, kind, used_change, rollover_change, purchased_change, used_after, rollover_after, "
    "purchased_after, detail, created_at"
)


@pytest.fixture
def own(database_url: str, redis_url: str) -> Settings:
    """A ledger of this test's own, to be migrated back and forth."""
    return settings_for(database_url, redis_url)


def test_a_worker_of_the_release_before_writes_and_reads_beside_a_new_one(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker_resources(own) as resources:
        accounts.open_new(resources, USER, "basic", **WHO)
        with monkeypatch.context() as before:
            before.setattr(batch, "_COPY_ENTRIES", f"COPY ledger_entry ({OLD_COLUMNS}) FROM STDIN")
            before.setattr(batch, "_COPY_ACCOUNTS", f"COPY account ({ACCOUNT_COLUMNS}, opened_at) FROM STDIN")
            shorter = {batch._COPY_ENTRIES, batch._COPY_ACCOUNTS}
            before.setattr(
                batch,
                "copy_rows",
                lambda cursor, statement, rows: copy_rows(
                    cursor, statement, [row[:-2] for row in rows] if statement in shorter else rows
                ),
            )
            credits.grant(resources, USER, METER, 5, "o1")
            accounts.open_new(resources, TRIAL, "basic")
        credits.grant(resources, USER, METER, 5, "o2", **WHO)
        assert verify_ledger(resources).differences == []
    assert rows(own, "SELECT entry_key, actor FROM ledger_entry WHERE kind = 'grant' ORDER BY seq") == [
        ("grant:o1", None), ("grant:o2", "alice"),
    ]  # fmt: skip


def test_entries_keep_their_meaning_and_their_proof_forward_and_back(own: Settings) -> None:
    assert own.database_url is not None
    with worker_resources(own) as resources:
        accounts.open_new(resources, USER, "basic", **WHO)
        credits.grant(resources, USER, METER, 5, "o1", **WHO)
    entries = f"SELECT {OLD_COLUMNS} FROM ledger_entry ORDER BY seq"
    before = rows(own, entries)
    migrate(own.database_url, "0005")
    *kept, forgotten = rows(own, entries)  # a release without grants is told once what becomes of them
    assert (kept, "merge_grants" in forgotten) == (before, True)
    migrate(own.database_url)
    assert rows(own, entries) == [*before, forgotten]
    assert rows(own, "SELECT DISTINCT actor, reason FROM ledger_entry") == [(None, None)]
    with worker_resources(own) as resources:
        assert credits.grant(resources, USER, METER, 5, "o1", **WHO).repeated
        assert verify_ledger(resources).differences == []
