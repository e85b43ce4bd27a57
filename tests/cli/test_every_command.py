"""Every command that prints data prints it as JSON: plain numbers, and times as ISO 8601 in UTC.

The commands are those of the parser. A new one is in `WITHOUT_JSON` with the reason, or has an example below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer
from redis import Redis
from typer.main import get_command

from config.settings import DEFAULT_CATALOGUE, Settings
from tests.support.commands import METER, USER, Done, Meterfall, lines_of
from tests.support.ledger import rows
from tests.support.streams import drain
from worker.cli import app
from worker.keyspace.keys import Partition

WITHOUT_JSON = {
    "worker run": "runs until it is stopped, and prints logs",
    "serve": "runs until it is stopped, and prints logs",
    "account export": "prints JSON lines already, one for each account",
    "catalogue show": "prints the text of a catalogue, which is TOML",
}
# They take minutes or servers of their own; these tests parse their JSON.
RUN_ELSEWHERE = {
    "demo": "tests/demo/test_demo.py",
    "replay": "tests/demo/test_replay.py",
    "bench": "tests/project/test_bench.py",
}
# Run in this order, each on what those before have left. A code other than 0 is a verdict, not an error.
EXAMPLES = [
    "migrate",
    "plans",
    f"account open {USER} basic",
    "account open other basic",
    "account open third tenant",
    f"account show {USER}",
    f"account set-status {USER} active",
    f"account set-timezone {USER} America/New_York",
    f"account set-notices {USER} balance.threshold:percent=80",
    f"account set-trust {USER} trusted",
    f"account change-plan {USER} plus",
    f"account grant {USER} {METER} 5000 --key order-1",
    f"account grant {USER} {METER} 50 --key gift-1 --category promotional --priority 10 --starts 2035-01-01T00:00:00Z "
    "--expires 2036-01-01T00:00:00Z",
    f"account credits {USER}",
    f"account set-limit {USER} {METER} 90000 --per week --of user --key limit-1",
    f"account set-limit {USER} {METER} --per week --of user --remove",
    f"account set-limit {USER} {METER} 90000",
    f"account limits {USER}",
    f"account set-pay-from {USER} allowance",
    f"account set-pay-from {USER} all",
    f"account clawback {USER} {METER} 10 --key refund-1 --order order-1",
    f"account adjust {USER} {METER} --rollover=-7 --key fix-1 --reason test",
    f"account forgive-debt {USER} {METER} --key gift-1",
    f"account undo {USER} adjust:fix-1",
    f"account renew {USER} in-1 <now> 2036-12-01T00:00:00Z",
    f"account set-period {USER} 2036-12-02T00:00:00Z --key fix-2",
    "account seed fourth --plan tenant",
    "account grant fourth credits 5 --key order-2",
    "account carry-over fourth third --key trial",
    "account list",
    "emit <events>",
    "emit --raw <refused>",
    "<drain>",
    f"check {USER} {METER} 5",
    f"charge {USER} {METER} 5 event-2",
    f"remaining {USER} --meter {METER}",
    f"plan-backend {USER} gemini_first --meter {METER}",
    f"reserve {USER} {METER} 600 job-1",
    f"capture {USER} {METER} job-1 page-1 200",
    f"holds extend {USER} {METER} job-1 --ttl-seconds 900",
    "holds list",
    f"holds show {USER} job-1",
    f"settle {USER} {METER} job-1 100",
    f"reserve {USER} {METER} 600 job-2",
    f"release {USER} {METER} job-2",
    f"reserve {USER} {METER} 600 job-3",
    f"holds release {USER} {METER} job-3",
    f"estimate {USER} {METER} 1840",
    f"pool decide {USER} 40 request-1",
    f"pool settle {USER} request-1 31",
    f"pool decide {USER} 40 request-2",
    f"pool release {USER} request-2 failed",
    f"pool confirm {USER} 40 request-3 9",
    "pool credit order-9 500",
    "pool status",
    "<drain>",
    f"usage {USER}",
    f"usage {USER} --breakdown",
    f"usage {USER} --engagement",
    f"usage {USER} --timeline",
    f"usage {USER} --events",
    f"explain {USER} event-1",
    "account find --plan plus",
    "report usage --by day,account",
    "report top",
    "report near-limit --percent 1",
    "report debtors",
    "report purchased",
    "report uncollected",
    f"reverse {USER} event-1",
    "dead list",
    "dead summary",
    "dead show 1",
    "dead drop 1 --why test",
    "dead replay 2",
    "dead list --state dropped",
    "catalogue list",
    f"catalogue diff {DEFAULT_CATALOGUE}",
    f"catalogue simulate {DEFAULT_CATALOGUE} --since 2026-01-01T00:00:00Z --plan-map basic=plus",
    f"catalogue apply {DEFAULT_CATALOGUE} --yes",
    "partition pause 3 --reason test",
    "partition list",
    "partition resume 3",
    "notices list",
    "notices list --dead",
    "notices feed",
    "notices show <notice>",
    "notices replay",
    "webhooks add https://example.com/ --kind balance.debt",
    "webhooks list",
    "webhooks test <webhook> --wait-seconds 0",
    "webhooks rotate <webhook>",
    "webhooks remove <webhook> --yes",
    "api-keys add tts-eu --role producer --expires 2036-01-01T00:00:00Z --reason test",
    "api-keys list",
    "api-keys revoke tts-eu --yes",
    "api-keys list --all",
    "partition move 9",
    "spool list",
    "spool send",
    "pending reconcile",
    "status",
    "health",
    "verify",
    "account close other --yes",
    "account reopen other basic",
    "account import <accounts>",
    "cache reset",
    "cache acknowledge --reason test",
    "<settle>",
    "repartition 8",
]

# Fields whose text may consist of digits, beside ids and keys: exact decimals, and names.
TEXTS = {"call", "catalogue", "digest", "history", "host", "multiplier", "release", "revision", "wants_revision"}
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")


def leaves(group: typer.core.TyperGroup, path: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command of the parser that does something, with its name."""
    for name, command in group.commands.items():
        named = f"{path} {name}".strip()
        if isinstance(command, typer.core.TyperGroup):
            yield from leaves(command, named)
        elif isinstance(command, typer.core.TyperCommand):
            yield named, command


def commands() -> dict[str, typer.core.TyperCommand]:
    root = get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    return dict(leaves(root))


def takes_json(command: typer.core.TyperCommand) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)


def command_in(line: str) -> str:
    """The command of an example, without arguments."""
    first, *rest = line.split()
    known = commands()
    return f"{first} {rest[0]}" if first not in known and rest else first


def wrong_in(value: Any, at: str) -> Iterator[str]:
    """What in a parsed answer is a number or a time in the form for people."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from wrong_in(each, f"{at}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from wrong_in(each, at)
    elif isinstance(value, str):
        name = at.rpartition(".")[2]
        if _TIME.fullmatch(value) and not is_iso_utc(value):
            yield f"{at}: {value!r} is no ISO 8601 time in UTC"
        elif _NUMBER.fullmatch(value) and name not in TEXTS and not name.endswith(("id", "key")):
            yield f"{at}: {value!r} is a number in quotes; if it is an id, add its field to TEXTS"


def is_iso_utc(text: str) -> bool:
    try:
        return "T" in text and datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def test_each_command_takes_json_or_says_why_not() -> None:
    known = commands()
    lacking = {name for name, command in known.items() if not takes_json(command)} - WITHOUT_JSON.keys()
    assert lacking == set(), (
        "give these commands `as_json: JsonOption = False` (worker/cli/options.py) and print with print_rows, "
        "print_fields or print_answer (worker/cli/io.py); if one prints no data, add it to WITHOUT_JSON with the reason"
    )
    needless = {name for name in WITHOUT_JSON if name not in known or takes_json(known[name])}
    assert needless == set(), "take these out of WITHOUT_JSON: there is no such command, or it takes --json"


def test_each_command_with_json_has_an_example() -> None:
    with_json = {name for name, command in commands().items() if takes_json(command)}
    shown = {command_in(line) for line in EXAMPLES if not line.startswith("<")} | RUN_ELSEWHERE.keys()
    assert with_json - shown == set(), "add an example of each of these commands to EXAMPLES, after what it needs"
    assert shown - with_json == set(), "take these out of EXAMPLES or RUN_ELSEWHERE: no such command takes --json"


def test_those_that_run_elsewhere_have_their_json_parsed_there() -> None:
    for command, file in RUN_ELSEWHERE.items():
        text = Path(__file__).parents[2].joinpath(file).read_text(encoding="utf-8")
        assert '"--json"' in text, f"{file} runs {command} with --json no more"
        assert "json.loads(" in text, f"{file} parses no JSON of {command} any more"


def named(settings: Settings, word: str) -> str:
    """A word of an example, with the id of a notice or a webhook that is there."""
    queries = {
        "<notice>": "SELECT notice_id FROM notice WHERE kind = 'partition.paused'",
        "<webhook>": "SELECT webhook_id FROM webhook",
    }
    return str(rows(settings, queries[word])[0][0]) if word in queries else word


def test_every_command_prints_json_with_plain_numbers_and_utc_times(
    settings: Settings, redis: Redis, meterfall: Meterfall, tmp_path: Path
) -> None:
    files = {
        "events": lines_of({"event_id": "event-1", "quantity": 7, "dimensions": {"document_id": "d", "page_idx": 3}}),
        "refused": "".join(json.dumps({"event_id": f"r{n}", "user_id": USER, "meter": "new"}) + "\n" for n in range(2)),
        "accounts": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    exported = meterfall.done("account", "open", "elsewhere", "basic") and meterfall.done("account", "export")
    (tmp_path / "accounts").write_text(exported.replace("elsewhere", "imported"), encoding="utf-8")
    redis.xadd(Partition(9).entries, {"v": "1", "e": json.dumps({"event_id": "stranded", "user_id": "third"})})
    spool = {"METERFALL_SPOOL_PATH": str(tmp_path / "spool")}
    users = (USER, "other", "third", "fourth", "elsewhere", "imported")

    found = []
    for line in EXAMPLES:
        if line in ("<drain>", "<settle>"):
            for user in users:
                drain(settings, user)
            continue
        words = [str(tmp_path / word[1:-1]) if word[1:-1] in files else word for word in line.split()]
        words = [datetime.now().astimezone().isoformat() if word == "<now>" else word for word in words]
        words = [named(settings, word) for word in words]
        done: Done = meterfall(*words, "--json", **spool)
        try:
            printed = json.loads(done.out)
        except ValueError:
            found.append(
                f"meterfall {line} --json: exit code {done.code}, no JSON: {done.out[:100]!r} {done.err[:300]}"
            )
            continue
        found += [f"meterfall {line} --json: {wrong}" for wrong in wrong_in(printed, "")]
    assert not found, "\n".join(found)
