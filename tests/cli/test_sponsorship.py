"""The commands about the sponsorship pool, and the estimate."""

from __future__ import annotations

from config.settings import Settings
from tests.support.commands import METER, USER, Meterfall, assert_all_refused
from tests.support.resources import worker_resources
from worker.consumer.drain import drain_stream
from worker.keyspace import keys


def test_the_pool_covers_a_request_from_the_first_decision_to_the_books(
    settings: Settings, meterfall: Meterfall
) -> None:
    meterfall.done("account", "open", USER, "basic")
    assert meterfall("pool", "decide", USER, "40", "request-1", "--json").json["reason"] == "no_budget"
    assert meterfall.done("account", "set-trust", USER, "trusted", "--json")["trust"] == "trusted"
    drain_pool(settings)
    decided = meterfall.done("pool", "decide", USER, "40", "request-1", "--json")
    assert (decided["serve"], decided["absorb"], decided["charge"]) == ("free", 40, 0)
    assert meterfall.done("pool", "status", "--json")["held"] == 40
    advised = meterfall.done("pool", "decide", USER, "200", "request-2", "--json")
    assert (advised["serve"], advised["absorb"], advised["charge"]) == ("partial", 160, 40)
    confirmed = meterfall.done("pool", "confirm", USER, "200", "request-2", "40", "--json")
    assert (confirmed["absorb"], confirmed["outstanding"]) == (160, 0)
    assert meterfall("pool", "decide", USER, "1", "request-3").code == 1, "the budget is spent"
    settled = meterfall.done("pool", "settle", USER, "request-1", "31", "--json")
    assert (settled["absorbed"], settled["returned"]) == (31, 9)
    assert meterfall.done("pool", "release", USER, "request-2", "no answer came", "--json")["state"] == "held"
    assert meterfall.done("pool", "credit", "order-9", "509", "--json")["credited"] == 50
    meterfall.done("pool", "credit", "order-9", "509")
    drain_pool(settings)
    status = meterfall.done("pool", "status", "--json")
    assert (status["initial"], status["balance"], status["held"], status["available"]) == (10_000, 10_019, 0, 10_019)
    assert (status["absorbed_today"], status["budgets"]["trusted"]) == (31, 200)
    assert [(grant["user_id"], grant["absorbed"], grant["pool_after"]) for grant in status["grants"]] == [
        (USER, 31, 9_969)
    ]
    assert meterfall.done("verify", "--json")["differences"] == []


def test_an_estimate_says_who_would_pay_and_fails_when_nobody_would(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    found = meterfall.done("estimate", USER, METER, "1000", "--model", "m2", "--json")
    assert (found["amount"], found["allowed"], found["expected"]["from_subscription"]) == (1_500, True, 1_500)
    beyond = meterfall("estimate", USER, METER, "1000000", "--json")
    assert (beyond.code, beyond.json["allowed"], beyond.json["check"]["reason"]) == (1, False, "limit_exceeded")
    output = meterfall.done("estimate", USER, METER, "5")
    assert "from_subscription" in output
    assert "gate: absorbs 0, leaves 5 to charge (no_budget)" in output


def test_what_is_wrong_with_a_sponsored_request_is_named(meterfall: Meterfall) -> None:
    assert_all_refused(
        meterfall,
        [
            (["pool", "decide", "a b", "40", "request-1"], {}, ["user_id"]),
            (["pool", "decide", USER, str(10**13), "request-1"], {}, ["estimate"]),
            (["pool", "decide", USER, "40", ""], {}, ["request_id"]),
            (["pool", "credit", "order-9", str(10**13)], {}, ["paid"]),
            (["pool", "status", "--grants", "1001"], {}, ["grants"]),
            (["account", "set-trust", USER, "friend"], {}, ["trust", "elite"]),
            (["estimate", USER, "voice", "1"], {}, ["meter", METER]),
        ],
    )
    nobody = meterfall("pool", "decide", "", "40", "request-1", "--json")
    assert (nobody.code, nobody.json["reason"]) == (1, "no_identity")
    unknown = meterfall("pool", "settle", USER, "request-1", "40")
    assert (unknown.code, unknown.out) == (1, "")
    assert "unknown" in unknown.err


def drain_pool(settings: Settings) -> None:
    """Drain the pool's stream in this process."""
    with worker_resources(settings) as resources:
        drain_stream(resources, keys.SPONSORSHIP)
