"""Accounts are found by what an operator knows of them, page by page, and as many as there are."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from random import Random

import psycopg
import pytest

from config.settings import Settings
from schemas.reports import FoundAccounts
from tests.support.commands import Meterfall, assert_refused
from tests.support.ledger import execute, give_accounts
from worker.accounts import Accounts
from worker.admin.erasure import close_account
from worker.errors import ReportError
from worker.reports.finding import find
from worker.resources import Resources

BASIC = ("user-1", "user-2", "user-10", "user-1x", "user.1", "user-", "zoe@example.org", "User-1", "user-1|a", "_u")
PLUS = [f"plus-{number:03}" for number in range(23)]


@pytest.fixture
def meterfall(command_server: subprocess.Popen[str], settings: Settings) -> Meterfall:
    return Meterfall(command_server, settings)


@pytest.fixture
def accounts_open(settings: Settings, resources: Resources) -> Resources:
    give_accounts(settings, BASIC, "basic")
    give_accounts(settings, PLUS, "plus")
    execute(settings, "UPDATE account SET status = 'past_due' WHERE user_id = ANY(%s)", PLUS[::3])
    return resources


def ids(found: FoundAccounts) -> list[str]:
    return [account.user_id for account in found.accounts]


def test_each_condition_finds_what_it_says_and_together_they_narrow(accounts_open: Resources) -> None:
    assert ids(find(accounts_open)) == sorted([*BASIC, *PLUS]), "without a condition: all, sorted by bytes"
    assert ids(find(accounts_open, user_id="user-1")) == ["user-1"]
    assert ids(find(accounts_open, user_id="user-3")) == []
    for prefix in ("user-1", "user-", "u", "User", "user-1|", "z"):
        assert ids(find(accounts_open, prefix=prefix)) == sorted(name for name in BASIC if name.startswith(prefix))
    assert ids(find(accounts_open, plan="plus")) == PLUS
    assert ids(find(accounts_open, status="past_due")) == PLUS[::3]
    assert ids(find(accounts_open, plan="plus", status="active", prefix="plus-00")) == [
        name for number, name in enumerate(PLUS[:10]) if number % 3
    ]
    assert ids(find(accounts_open, plan="basic", status="past_due")) == []


def test_a_line_of_the_log_leads_to_its_account(accounts_open: Resources) -> None:
    for user_id in (*BASIC, PLUS[0]):
        digits = sha256(user_id.encode()).hexdigest()[:12]
        for name in (digits, f"user:{digits}"):
            (found,) = find(accounts_open, log_name=name).accounts
            assert (found.user_id, found.name_in_logs) == (user_id, f"user:{digits}")
    assert find(accounts_open, log_name="0" * 12).total == 0


@pytest.mark.usefixtures("accounts_open")
def test_a_name_in_logs_and_a_prefix_are_looked_up_in_an_index(settings: Settings) -> None:
    for condition, index in (
        ("substr(sha256(decode(user_id, 'escape')), 1, 6) = decode('00ff00ff00ff', 'hex')", "account_log_name"),
        ("user_id >= 'user-1' AND user_id < 'user-1' || '~'", "account_pkey"),
    ):
        with psycopg.connect(settings.database_url or "") as postgres:
            postgres.execute("SET enable_seqscan = off")
            plan = postgres.execute(f"EXPLAIN SELECT user_id FROM account WHERE {condition}".encode()).fetchall()
        assert index in str(plan)


@pytest.mark.parametrize("limit", [1, 4, 22, 23, 24])
def test_pages_follow_each_other_without_a_gap(accounts_open: Resources, limit: int) -> None:
    after, seen = None, []
    while True:
        page = find(accounts_open, plan="plus", after=after, limit=limit)
        assert page.total == len(PLUS), "the total counts all pages"
        seen += ids(page)
        if page.more_after is None:
            break
        assert len(page.accounts) == limit
        after = page.more_after
    assert seen == PLUS


def test_a_closed_account_is_found_by_its_pseudonym_alone(accounts_open: Resources) -> None:
    digits = sha256(b"user-1").hexdigest()[:12]
    history = close_account(accounts_open, "user-1", forfeit=True)
    assert ids(find(accounts_open, user_id="user-1")) == []
    assert ids(find(accounts_open, log_name=digits)) == []
    assert ids(find(accounts_open, status="closed")) == ids(find(accounts_open, prefix="closed:")) == [history]


def test_bad_input_names_the_field_and_what_is_allowed(accounts_open: Resources) -> None:
    for wrong, names in (
        ({"user_id": "a b"}, ("user_id", "A-Z")),
        ({"prefix": ""}, ("prefix", "1 to 128")),
        ({"prefix": "%"}, ("prefix",)),
        ({"after": "x" * 129}, ("after",)),
        ({"log_name": "user:123"}, ("log_name", "12 digits")),
        ({"log_name": "user:00FF00ff00ff"}, ("log_name",)),
        ({"plan": "gold"}, ("plan", "gold", "basic")),
        ({"status": "gone"}, ("status", "gone", "past_due", "closed")),
        ({"limit": 0}, ("limit", "10000")),
    ):
        with pytest.raises(ReportError) as refused:
            find(accounts_open, **wrong)
        assert all(name in str(refused.value) for name in names), (wrong, refused.value)


def test_ids_that_no_one_expects_have_names_in_logs(settings: Settings, resources: Resources) -> None:
    """Every character that an id may have goes through the index of Postgres as through the log's hash."""
    random, characters = Random(3), "ABCxyz019._:@|+=/-"
    users = sorted({"".join(random.choices(characters, k=random.randint(1, 128))) for _ in range(200)})
    give_accounts(settings, users, "basic")
    for user_id in users:
        assert user_id in ids(find(resources, log_name=sha256(user_id.encode()).hexdigest()[:12]))


def test_hosts_find_accounts_also(accounts_open: Resources, settings: Settings) -> None:
    with Accounts.connect(settings) as accounts:
        found = accounts.find(prefix="plus", status="past_due", limit=2)
        assert found == find(accounts_open, prefix="plus", status="past_due", limit=2)
        assert (ids(found), found.total, found.more_after) == (PLUS[:4:3], 8, PLUS[3])
        with pytest.raises(ReportError, match="plan"):
            accounts.find(plan="gold")


@pytest.mark.usefixtures("accounts_open")
def test_the_command_finds_and_says_how_many_there_are(meterfall: Meterfall) -> None:
    page = meterfall("account", "find", "--plan", "plus", "--limit", "2")
    assert (page.code, page.err) == (0, "2 of 23; the next: --after plus-001\n")
    assert "plus-001" in page.out
    found = meterfall.done("account", "find", "--plan", "plus", "--after", "plus-020", "--json")
    assert [account["user_id"] for account in found["accounts"]] == PLUS[21:]
    assert (found["total"], found["more_after"]) == (23, None)
    assert FoundAccounts.model_validate(found)
    name = f"user:{sha256(b'user-1').hexdigest()[:12]}"
    assert [
        each["user_id"] for each in meterfall.done("account", "find", "--log-name", name, "--json")["accounts"]
    ] == ["user-1"]
    assert meterfall.done("account", "find", "--id", "nobody") == "none\n"
    assert_refused(meterfall("account", "find", "--plan", "gold"), 2, "plan", "gold", "plus")
