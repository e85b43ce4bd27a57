"""A closing says what it loses, and a closed id may begin anew without billing anything twice."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from redis import Redis

from config.settings import Settings
from tests.admin.test_accounts import METER, USER, bill, buckets, stored
from tests.support.ledger import give_account, rows
from tests.support.streams import drain, partition_of
from worker.admin import accounts, credits, dead_letters
from worker.admin.erasure import close_account, reopen
from worker.client import Billing
from worker.errors import AccountError, OrderUsed
from worker.ledger.connection import batch_connection
from worker.ledger.summing import sum_up
from worker.reports.proof import verify_ledger
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources
from worker.rules.account import Cause


def consistent(resources: Resources) -> bool:
    return verify_ledger(resources).differences == []


def test_a_closing_names_all_that_it_loses_and_wants_to_be_told(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    give_account(settings, USER, "basic", buckets={METER: (0, 300, 25_000), "ocr_tokens": (0, -9, 0)})
    with Billing.connect(settings) as billing:
        billing.reserve(USER, METER, 5, key="job-1")
        billing.emit(USER, METER, 5, event_id="e1")
    before = stored(settings)
    with pytest.raises(AccountError) as refused:
        close_account(resources, USER)
    assert str(refused.value) == (
        f"forfeit: closing {USER} loses 25000 purchased of {METER}, 300 rollover of {METER}, 1 open hold of {METER}, "
        "1 event not applied yet; say so with forfeit (--forfeit)"
    )
    assert stored(settings) == before
    history = close_account(resources, USER, forfeit=True)
    drain(settings, USER)
    assert rows(settings, "SELECT user_id, uncollected FROM usage_log") == [(history, 5)]
    assert close_account(resources, USER) == history, "a repeat loses nothing"
    assert consistent(resources)


def test_an_account_that_loses_nothing_closes_at_once(settings: Settings, resources: Resources) -> None:
    give_account(settings, USER, "basic", buckets={METER: (70, -5, 0)})
    assert close_account(resources, USER).startswith("closed:")


@pytest.fixture
def life(settings: Settings, redis: Redis, resources: Resources) -> str:
    """An account with an event and an order, closed; the name of its history."""
    accounts.open_new(resources, USER, "basic")
    credits.grant(resources, USER, METER, 500, "order-1")
    bill(settings, redis, ("e1", METER, 100))
    history = close_account(resources, USER, forfeit=True)
    drain(settings, USER)
    bill(settings, redis, ("while-closed", METER, 3))
    return history


def test_a_reopened_id_begins_anew_and_bills_nothing_twice(
    settings: Settings, redis: Redis, resources: Resources, life: str
) -> None:
    answer = reopen(resources, USER, "free", actor="ops", reason="came back")
    assert (answer.repeated, answer.account.plan, answer.account.reopened) == (False, "free", 1)
    assert reopen(resources, USER, "free").repeated
    assert buckets(resources) == (0, 0, 0)
    bill(settings, redis, ("e1", METER, 100), ("while-closed", METER, 3), ("e2", METER, 7))
    assert buckets(resources) == (7, 0, 0), "old events are duplicates"
    assert rows(settings, "SELECT event_id FROM usage_log WHERE user_id = %s", USER) == [("e2",)]
    bill(settings, redis, ("e1", METER, 99))
    assert rows(settings, "SELECT reason FROM dead_letter") == [("id_conflict",)]
    with pytest.raises(OrderUsed):
        credits.grant(resources, USER, METER, 500, "order-1")
    assert rows(settings, "SELECT count(*) FROM usage_log WHERE user_id = %s", life) == [(2,)]
    assert consistent(resources)


def test_an_id_is_closed_and_reopened_again(settings: Settings, redis: Redis, resources: Resources, life: str) -> None:
    reopen(resources, USER, "free")
    bill(settings, redis, ("e2", METER, 7))
    second = close_account(resources, USER)
    assert second != life
    drain(settings, USER)
    assert close_account(resources, USER) == second
    bill(settings, redis, ("e1", METER, 100), ("e2", METER, 7), ("late", METER, 1))
    late = rows(settings, "SELECT user_id FROM usage_log WHERE event_id = 'late'")
    assert (late, rows(settings, "SELECT count(*) FROM usage_log")) == ([(second,)], [(4,)])
    assert reopen(resources, USER, "basic").account.reopened == 2
    bill(settings, redis, ("e1", METER, 100), ("e2", METER, 7), ("late", METER, 1), ("e3", METER, 2))
    assert buckets(resources) == (2, 0, 0)
    for table in ("usage_log", "ledger_entry", "account"):
        for name in (life, second):
            found = rows(settings, f"SELECT count(*) > 0 FROM {table} WHERE user_id = %s", name)
            assert found == [(True,)]
    assert consistent(resources)


def test_a_client_sees_the_new_account(settings: Settings, resources: Resources, life: str) -> None:
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER, 1).reason == "unknown_account"
        reopen(resources, USER, "free")
        drain(settings, USER)
        assert billing.check(USER, METER, 5_000).allowed
        billing.charge(USER, METER, 5, event_id="new")
        billing.emit(USER, METER, 100, event_id="e1")
        drain(settings, USER)
        assert (billing.check(USER, METER).available, billing.check(USER, METER).pending) == (4_995, 0)


REFUSED: dict[str, tuple[tuple[str, str], str]] = {
    "never closed": (("nobody", "basic"), r"^user_id: nobody was never closed; open it$"),
    "open": (("open", "basic"), r"^user_id: open has an account already$"),
    "reopened otherwise": (("again", "plus"), r"^user_id: again has an account already$"),
    "no id": (("a b", "basic"), r"^user_id: must be 1 to 128"),
}


def test_what_cannot_be_reopened_is_named(settings: Settings, resources: Resources, life: str) -> None:
    accounts.open_new(resources, "open", "basic")
    accounts.open_new(resources, "again", "basic")
    close_account(resources, "again")
    reopen(resources, "again", "basic")
    before = stored(settings)
    for (user_id, plan), pattern in REFUSED.values():
        with pytest.raises(AccountError, match=pattern):
            reopen(resources, user_id, plan)
    with pytest.raises(AccountError, match=r"^user_id: closed:.* was never closed"):
        reopen(resources, life, "basic")
    opening: Any = {"plan": "basic"}
    with pytest.raises(AccountError, match=r"^user_id: .* was closed; reopen it, or take another id$"):
        accounts.open_new(resources, USER, **opening)
    assert stored(settings) == before


@pytest.mark.parametrize("unknown", ["rename_sums", "checkpoints.erase"])
def test_a_release_that_knows_less_of_an_account_cannot_close_it(
    settings: Settings, redis: Redis, resources: Resources, monkeypatch: pytest.MonkeyPatch, unknown: str
) -> None:
    """Else reports would count its usage twice, and its checkpoint would keep what an erasure must erase."""
    accounts.open_new(resources, USER, "basic")
    bill(settings, redis, ("e1", METER, 100))
    with batch_connection(resources.engine) as postgres:
        sum_up(postgres, "", 1_000)
    prove_ledger(resources)
    before = stored(settings)
    with monkeypatch.context() as former:
        former.setattr(f"worker.admin.erasure.{unknown}", lambda *_: None)
        with pytest.raises(psycopg.errors.RaiseException, match="close it with the release of these tables"):
            close_account(resources, USER, forfeit=True)
    assert stored(settings) == before
    assert close_account(resources, USER, forfeit=True).startswith("closed:")


def test_an_erased_name_leaves_the_reasons_of_other_letters(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": "{}"})
    drain(settings, USER)
    (letter,) = dead_letters.listed(resources)
    dead_letters.drop(resources, letter.id, cause=Cause(actor="jane", reason=f"a refund for {USER}"))
    close_account(resources, USER, forfeit=True)
    assert rows(settings, "SELECT resolved_reason FROM dead_letter") == [("erased",)]
