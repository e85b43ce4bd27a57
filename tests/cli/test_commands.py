"""The commands as a whole: how they are started, what the help lists, and which version they tell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import worker.cli
from config.settings import Settings
from tests.support.commands import MODULE, Meterfall, assert_refused
from tests.support.ledger import rows
from tests.support.paths import ROOT
from worker import version

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_the_command_and_the_module_are_the_same(bare: Meterfall) -> None:
    program = [str(Path(sys.executable).with_name("meterfall"))]
    listed, refused = ["plans", "--json"], ["check", "u"]
    for arguments in (listed, refused):
        assert bare.started(program, *arguments) == bare.started(MODULE, *arguments) == bare(*arguments)
    assert bare(*listed).code == 0
    assert_refused(bare(*refused), 2, "meter")


def test_help_names_every_command(bare: Meterfall) -> None:
    text = bare.done("--help")
    for command in (
        "migrate", "worker", "emit", "check", "reserve", "capture", "settle", "release", "charge", "remaining",
        "plan-backend", "holds", "plans", "catalogue", "account", "reverse", "usage", "explain", "dead", "cache",
        "verify", "status", "estimate", "pool", "partition", "spool", "repartition", "demo", "replay", "bench",
    ):  # fmt: skip
        assert f" {command} " in text
    without = bare()
    assert (without.code, without.err) == (2, "")
    assert "Usage:" in without.out


def test_help_lists_each_group_under_its_title(bare: Meterfall) -> None:
    text = bare.done("--help")
    panels = re.findall(r"^╭─ (.+?) ─+╮$((?:\n│.*│$)+)", text, re.MULTILINE)
    listed = {title: re.findall(r"^│ ([a-z-]+) ", lines, re.MULTILINE) for title, lines in panels[1:]}
    assert panels[0][0] == "Options"
    assert listed == {title: list(typer.main.get_group(app).commands) for title, app in worker.cli.GROUPS.items()}
    assert sum(map(len, listed.values())) == len(typer.main.get_group(worker.cli.app).commands)


def test_the_map_of_the_room_names_every_command_of_each_file() -> None:
    lines = re.sub(r",\n +", ", ", worker.cli.__doc__ or "")  # a long one goes on in the next
    mapped = dict(re.findall(r"^(\w+) {2,}([a-z-]+(?: …)?(?:, [a-z-]+(?: …)?)*)$", lines, re.MULTILINE))
    apps = {name: sys.modules[f"worker.cli.{name}"].app for name in mapped}
    assert list(apps.values()) == list(worker.cli.GROUPS.values())
    for name, app in apps.items():
        commands = typer.main.get_group(app).commands
        found = {
            f"{each} …" if isinstance(command, typer.core.TyperGroup) else each for each, command in commands.items()
        }
        assert set(mapped[name].split(", ")) == found


# ---------------------------------------------------------------------------------------------------------------------
# What a command line costs

OF_SERVERS = ("alembic", "loguru", "psycopg", "redis", "rq", "sqlalchemy")
RUN_AND_NAME_MODULES = """
import sys
import worker.cli
try:
    worker.cli.main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


# Typer itself brings in rich for the help, and pydantic for the values of a command.
@pytest.mark.parametrize(
    ("arguments", "environ", "unneeded"),
    [
        (["--version"], {}, {*OF_SERVERS, "pydantic", "rich", "importlib.metadata"}),
        (["--help"], {}, {*OF_SERVERS, "pydantic"}),
        (["check", "user-42"], {}, {*OF_SERVERS}),
        (["check", "user-42", "premium_voice", "--nope"], {}, {*OF_SERVERS}),
        ([], {"_METERFALL_COMPLETE": "complete_bash", "COMP_WORDS": "meterfall dead list -", "COMP_CWORD": "3"},
         {*OF_SERVERS}),
    ],
    ids=["version", "help", "missing argument", "unknown option", "completion"],
)  # fmt: skip
def test_a_command_line_brings_in_only_what_it_needs(
    arguments: list[str], environ: dict[str, str], unneeded: set[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_NAME_MODULES, *arguments],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "worker.cli" in loaded
    assert loaded & unneeded == set()


# ---------------------------------------------------------------------------------------------------------------------
# The version


def test_the_version_is_told_without_servers(bare: Meterfall) -> None:
    shown = bare.started(MODULE, "--version")
    assert (shown.code, shown.err) == (0, "")
    assert re.fullmatch(rf"meterfall {re.escape(VERSION)}, tables at revision \d{{4}}\n", shown.out)
    assert bare("--version", "check") == bare("--version") == shown


def test_the_revision_is_the_one_to_which_the_tables_are_migrated(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("migrate")
    ((revision,),) = rows(settings, "SELECT version_num FROM meterfall_version")
    assert meterfall.done("--version").endswith(f", tables at revision {revision}\n")


def test_an_installation_without_a_tree_tells_its_own_version(tmp_path: Path) -> None:
    for package in ("config", "schemas", "worker"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    # Of some other project.
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "host"\nversion = "8.8.8"\n', encoding="utf-8")
    metadata = tmp_path / "meterfall-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: meterfall\nVersion: 9.9.9\n", encoding="utf-8")
    shown = subprocess.run(
        [*MODULE, "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("meterfall 9.9.9, ")


def test_files_that_were_copied_without_a_version_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "DISTRIBUTION", "meterfall-of-nobody")
    assert version.read_version() == "unknown"
