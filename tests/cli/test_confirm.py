"""The question before a command that moves or destroys much, on a real terminal and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from redis import Redis

from config.settings import Settings
from tests.support.catalogues import newer_catalogue
from tests.support.commands import METER, USER, Meterfall, assert_refused, lines_of
from tests.support.ledger import rows
from tests.support.streams import drain
from tests.support.terminal import Shown, on_terminal
from worker.keyspace.keys import Partition

OTHER = "user-43"
SMALL = {"METERFALL_CONFIRM_AMOUNT_UNITS": "100", "METERFALL_CONFIRM_ITEMS": "1"}


class Case(NamedTuple):
    """A command, what its question says, and whether it needs --yes without a terminal."""

    command: str
    says: str
    is_final: bool = False


# Each asks by the settings of `SMALL`, in the world that `prepared` makes.
CASES = [
    Case(f"account grant {USER} {METER} 500 --key order-2", f"grant {USER}: {METER} purchased 1,000 → 1,500"),
    Case(
        f"account clawback {USER} {METER} 800 --key refund-1",
        f"clawback {USER}: {METER} purchased 1,000 → 200",
    ),
    Case(
        f"account clawback {USER} {METER} --order order-1 --total-refunded 900",
        f"clawback {USER}: {METER} purchased 1,000 → 100",
    ),
    Case(
        f"account adjust {USER} {METER} --purchased -600 --key fix-1 --reason test",
        f"adjust {USER}: {METER} purchased 1,000 → 400",
    ),
    Case(f"account forgive-debt {OTHER} {METER} --key gift-1", f"forgive debt {OTHER}: {METER} rollover -700 → 0"),
    Case(f"account undo {USER} grant:order-1", f"undo {USER}: {METER} purchased 1,000 → 0"),
    Case(f"reverse {USER} big", f"reversal {USER}: {METER} used 300 → 0"),
    Case(
        f"account carry-over {USER} third --key k --meter {METER}",
        f"transfer in third: {METER} purchased 0 → 1,000; transfer out {USER}: {METER} purchased 1,000 → 0",
    ),
    Case(f"account close {USER} --forfeit", f"close {USER}: ", is_final=True),
    Case(f"account open new basic --rollover {METER}=5000", f"open new: {METER} rollover 0 → 5,000"),
    Case("account seed new --plan tenant --amount 5000", "seed new: credits allowance 0 → 5,000"),
    Case("pool credit order-9 5000", "credit pool: balance ", is_final=True),
    Case(f"holds release {USER} {METER} job-1", f"release hold job-1 of {USER}: {METER} held 200 → 0"),
    Case("dead drop --reason unknown_meter", "2 open dead letters of reason unknown_meter", is_final=True),
    Case("dead replay --reason unknown_meter", "2 open dead letters of reason unknown_meter", is_final=True),
    Case("partition move 9", "2 stream entries would be moved"),
    Case("cache reset", "2 cached balances would be forgotten"),
]


@pytest.fixture
def prepared(settings: Settings, redis: Redis, meterfall: Meterfall) -> Meterfall:
    """Accounts, credits, debt, a hold, dead letters, cached balances and a stranded stream to move or destroy."""
    for user in (USER, OTHER, "third"):
        meterfall.done("account", "open", user, "basic")
    meterfall.done("account", "grant", USER, METER, "1000", "--key", "order-1")
    meterfall.done("account", "adjust", OTHER, METER, "--rollover=-700", "--key", "debt", "--reason", "test")
    meterfall.done("emit", "-", stdin=lines_of({"event_id": "big", "quantity": 300}))
    letters = [json.dumps({"event_id": f"e{n}", "user_id": USER, "meter": "new", "quantity": 1}) for n in range(2)]
    meterfall.done("emit", "--raw", "-", stdin="\n".join(letters))
    for user in (USER, OTHER, "third"):
        drain(settings, user)
    meterfall.done("reserve", USER, METER, "200", "job-1")
    meterfall.done("check", OTHER, METER)
    for number in range(2):
        redis.xadd(Partition(9).entries, {"v": "1", "e": json.dumps({"event_id": f"s{number}", "user_id": OTHER})})
    return meterfall


def state(settings: Settings, redis: Redis) -> list[object]:
    """All that a command here might change."""
    return [
        rows(settings, "SELECT * FROM account ORDER BY 1"),
        rows(settings, "SELECT * FROM balance ORDER BY 1, 2"),
        rows(settings, "SELECT count(*) FROM ledger_entry"),
        rows(settings, "SELECT id, state FROM dead_letter ORDER BY 1"),
        rows(settings, "SELECT epoch FROM ledger"),
        sorted(key for key in redis.scan_iter("*:events") if redis.xlen(key)),
        sorted(redis.scan_iter("*pending*")),
    ]


def asked(meterfall: Meterfall, command: str, answer: str, **environment: str) -> Shown:
    return on_terminal(
        command.split(), meterfall.environment | SMALL | environment, answers={"Go on?": answer}, columns=200
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.command.split()[:2]))
def test_a_command_that_moves_much_says_so_and_asks(
    case: Case, settings: Settings, redis: Redis, prepared: Meterfall
) -> None:
    before = state(settings, redis)
    refused = asked(prepared, case.command, "n\n")
    assert case.says in refused.screen
    assert (refused.code, refused.screen.splitlines()[-1].strip()) == (1, "meterfall: nothing was done")
    assert state(settings, redis) == before

    if case.is_final:
        assert_refused(prepared(*case.command.split(), **SMALL), 2, case.says, "nothing was done", "--yes")
        assert state(settings, redis) == before
        done = prepared(*case.command.split(), "--yes", **SMALL)
    else:
        done = prepared(*case.command.split(), **SMALL)
    assert (done.code, done.err) == (0, "")


def test_a_catalogue_is_put_in_force_only_after_a_yes(settings: Settings, meterfall: Meterfall, tmp_path: Path) -> None:
    path, newer = newer_catalogue(tmp_path)
    command = f"catalogue apply {path}"
    meterfall.done("catalogue", "list")
    for answer in ("n\n", "\n"):
        refused = asked(meterfall, command, answer)
        assert f"catalogue {newer.digest} would be in force from now on: " in refused.screen
        assert "multipliers.m2" in refused.screen, "the differences stand above the question"
        assert (refused.code, refused.screen.splitlines()[-1].strip()) == (1, "meterfall: nothing was done")
    for stdin in ("", "n\n", "y\n"):
        for more in ([], ["--json"]):
            refused_at_once = meterfall(*command.split(), *more, stdin=stdin)
            assert_refused(refused_at_once, 2, newer.digest, "nothing was done. Say --yes to go on")
    assert rows(settings, "SELECT count(*) FROM catalogue_version") == [(1,)]
    assert asked(meterfall, command, "y\n").code == 0
    assert rows(settings, "SELECT count(*) FROM catalogue_version") == [(2,)]


def test_a_yes_goes_on_and_json_stays_json(settings: Settings, prepared: Meterfall) -> None:
    command = f"account grant {USER} {METER} 500 --key order-2 --json"
    done = on_terminal(
        command.split(), prepared.environment | SMALL, answers={"Go on?": "y\n"}, columns=200, stdout_piped=True
    )
    assert (done.code, json.loads(done.piped)["balances"][METER]["purchased"]) == (0, 1_500)
    assert rows(settings, "SELECT purchased FROM balance WHERE user_id = %s AND meter = %s", USER, METER) == [(1_500,)]


def test_nobody_is_asked_up_to_the_setting_or_with_yes(prepared: Meterfall) -> None:
    for command in (
        f"account grant {USER} {METER} 100 --key order-2",
        f"account grant {USER} {METER} 101 --key order-3 --yes",
        f"account close {OTHER} --yes",
        "dead drop --reason unknown_meter --yes",
    ):
        done = asked(prepared, command, "n\n")
        assert (done.code, "Go on?" in done.screen) == (0, False), command


def test_a_repeat_that_changes_nothing_is_not_asked_about(prepared: Meterfall) -> None:
    done = asked(prepared, f"account grant {USER} {METER} 1000 --key order-1", "n\n")
    assert (done.code, "Go on?" in done.screen, "done before" in done.screen) == (0, False, True)


def test_an_import_and_another_number_of_streams_are_asked_about(settings: Settings, meterfall: Meterfall) -> None:
    for user in (USER, OTHER):
        meterfall.done("account", "open", user, "basic")
    exported = meterfall.done("account", "export")
    for user in (USER, OTHER):
        drain(settings, user)
    no = asked(meterfall, "repartition 5", "n\n")
    assert (no.code, "partitions: 8 → 5" in no.screen) == (1, True)
    assert rows(settings, "SELECT partitions FROM ledger") == [(8,)]
    done = meterfall("account", "import", "-", stdin=exported, **SMALL)
    assert_refused(done, 2, "has an account already")
