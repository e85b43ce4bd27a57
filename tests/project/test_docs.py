"""The documents say what is so: settings, commands, files, and an example that runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from config.settings import Settings, variable_name
from distributions.client import build, public
from schemas.answers import CheckAnswer, HoldState, Reason
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for, worker_resources
from tests.support.streams import drain
from tests.support.web import web_service
from worker.admin import accounts
from worker.cli import GROUPS, app
from worker.cli.roles import ROLES
from worker.client import Billing
from worker.contrib.fastapi import problem_of
from worker.errors import BillingError
from worker.keyspace import keys

README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def settings_row(field: str) -> str:
    """The row of the README's table for one setting."""
    info = Settings.model_fields[field]
    default = info.default
    if default is None or default == ():
        shown = "unset"
    elif isinstance(default, Path):
        shown = f"`{default.relative_to(ROOT)}`"
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{variable_name(field)}` | {shown} | {info.description} |"


def test_the_readme_lists_every_setting_with_its_default() -> None:
    listed = [line for line in README.splitlines() if line.startswith(("| `METERFALL_", "| `REDIS_", "| `DATABASE_"))]
    assert listed == [settings_row(field) for field in Settings.model_fields]


def test_the_readme_names_the_role_of_every_command() -> None:
    row = re.compile(r"^\| (producer|operator|monitor|worker|keys|service|owner|none) \| (.*) \|$", re.MULTILINE)
    told = {name: role for role, names in row.findall(README) for name in re.findall(r"`([a-z-]+)`", names)}
    assert told == ROLES
    assert set(get_command(app).commands) == set(told)  # type: ignore[attr-defined]


def test_every_link_of_the_documents_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README + ARCHITECTURE)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_architecture_names_every_file_of_the_worker() -> None:
    worker = ROOT / "worker"
    modules = {str(path.relative_to(ROOT)) for path in worker.rglob("*.py") if not path.name.startswith("__")}
    modules -= {str(path.relative_to(ROOT)) for path in worker.rglob("migrations/**/*.py")}
    assert len(modules) > 50
    assert sorted(name for name in modules if f"`{name}`" not in ARCHITECTURE) == []


def steps_in(text: str, before: str = "") -> list[str]:
    """The steps of a batch that a text numbers, with what stands before each number taken off."""
    return re.findall(rf"^ *{before}(\d+\. .*[^|\n])$", text, re.MULTILINE)


def test_the_steps_of_a_batch_are_the_same_in_the_code_and_where_they_are_told() -> None:
    steps = steps_in((ROOT / "worker/consumer/batch.py").read_text(encoding="utf-8"), "# ")
    assert [step.partition(".")[0] for step in steps] == [str(number) for number in range(1, 11)]
    assert steps_in((ROOT / "worker/consumer/__init__.py").read_text(encoding="utf-8")) == steps
    assert steps_in(ARCHITECTURE) == steps


def test_every_lua_script_is_in_the_table() -> None:
    names = {path.stem for path in (ROOT / "worker").rglob("*.lua")} - {"common", "sponsor"}
    assert sorted(name for name in names if f"`{name}`" not in ARCHITECTURE) == []


def test_the_readme_lists_the_commands_by_group() -> None:
    table = README.partition("| group | commands |\n|---|---|\n")[2].partition("\n\n")[0]
    commands = {title: typer.main.get_group(group).commands for title, group in GROUPS.items()}
    assert table.splitlines() == [
        f"| {title} | {', '.join(f'`{name}`' for name in names)} |" for title, names in commands.items()
    ]


def test_the_procfile_runs_commands_that_exist() -> None:
    lines = (ROOT / "Procfile").read_text(encoding="utf-8")
    commands = re.findall(r"^\w+: python -m worker (\w+)", lines, re.MULTILINE)
    root = typer.main.get_group(app)
    assert commands
    assert set(commands) <= set(root.commands)


def test_the_python_examples_of_the_readme_run(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, _, sponsored = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    settings = settings_for(database_url, redis_url)
    monkeypatch.setitem(sys.modules, "meterfall", public)  # as in the wheel
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    give_account(settings, "user-42", "basic")
    names = {"synthesize": lambda text: text.upper(), "text": "x" * 1_800}
    run(example, names)
    drain(settings, "user-42")
    query = "SELECT event_id, amount, from_subscription FROM usage_log"
    assert rows(settings, query) == [("job-7f3", 1_800, 1_800)]
    run(example.replace("1_840", "98_201").replace("job-7f3", "job-7f4"), names)
    assert capsys.readouterr().out == "limit_exceeded: 98200 of 100000 characters left\n"
    run(example.replace("user-42", "nobody"), names)
    assert capsys.readouterr().out == "unknown_account: 0 of None characters left\n"
    with worker_resources(settings) as resources:
        accounts.set_trust(resources, "user-42", "trusted")
    run(sponsored, {"billing": Billing.connect(), "answer_the_question": lambda: "42"})
    assert stream_length(settings) == 2  # the change of trust, and the settlement


def test_the_web_service_of_the_readme_runs(
    database_url: str, redis_url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, example, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    build.lay_out(tmp_path)
    stub = "async def synthesize(text):\n    for character in text:\n        yield character.upper()\n"
    (tmp_path / "readme.py").write_text(example + stub, encoding="utf-8")
    settings = settings_for(database_url, redis_url)
    give_account(settings, "user-42", "basic")
    with web_service("readme:app", settings, tmp_path_factory.mktemp("run"), code=tmp_path) as running:
        heard = running.ask("POST", "/speech?text=hello", x_user="user-42", idempotency_key="job-7f3")
        refused = running.ask("POST", "/speech?text=hello", x_user="user-42", idempotency_key="job-7f3")
    assert (heard.status, heard.body, refused.status) == (200, b"HELLO", 409)
    drain(settings, "user-42")
    assert rows(settings, "SELECT event_id, amount FROM usage_log") == [("job-7f3", 5)]


def test_the_readme_tells_the_status_of_every_error() -> None:
    table = README.partition("| error | status |\n|---|---|\n")[2].partition("\n\n")[0]
    told = {
        name: row[1]
        for row in (line.strip("| ").split(" | ") for line in table.splitlines())
        for name in row[0].split(", ")
    }
    answer = CheckAnswer(user_id="u", meter="m", requested=1, allowed=False, reason=Reason.LIMIT_EXCEEDED)
    hold = ("u", "k", "m", 1)
    errors: list[BillingError] = [
        public.UsageLimitExceeded(answer), public.UsageDenied(answer), public.HoldConflict(*hold),
        public.HoldClosed("u", "k", HoldState.SETTLED), public.EventConflict("u", "e", 1),
        public.InvalidRequest("key", "", "some"), public.ClientBusy(""), public.RedisUnavailable(""),
        public.LedgerUnavailable(), public.SpoolUnavailable("", ""), public.ClientClosed(),
        public.PartitionMismatch(1, 2), public.WrongRedis(""),
    ]  # fmt: skip
    kinds = {
        f"`{name}`" for name, kind in vars(public).items() if isinstance(kind, type) and issubclass(kind, BillingError)
    }
    assert set(told) == {f"`{type(error).__name__}`" for error in errors} == kinds - {"`BillingError`"}
    assert {f"`{type(each).__name__}`": problem_of(each)["status"] for each in errors} == {
        name: int(row[:3]) for name, row in told.items()
    }


def stream_length(settings: Settings) -> int:
    """Return the number of stream entries of the pool."""
    with worker_resources(settings) as resources:
        return int(resources.redis.xlen(keys.SPONSORSHIP.entries))


def run(example: str, names: dict[str, object]) -> None:
    """Execute an example and close the client that it leaves open."""
    namespace = dict(names)
    exec(example, namespace)
    billing = namespace["billing"]
    assert isinstance(billing, Billing)
    billing.close()
