"""Completion by the shell: the script for each of them, and what is proposed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Meterfall

BASH = shutil.which("bash") or ""
# Each shell, and how a line of the answer begins that its script understands.
PROPOSALS = {"bash": r"(.+)", "zsh": r'(?:_arguments [^"]+)?"(.+?)"(?::".+)?', "fish": r"([^\t]+)(?:\t.+)?"}


def question(shell: str, line: str) -> dict[str, str]:
    """The environment in which a shell's script asks what may stand at the end of a line."""
    about = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    if shell != "bash":
        about = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return {"_METERFALL_COMPLETE": f"complete_{shell}", **about}


def run_in(shell: Path, script: str, home: Path) -> str:
    """What a script prints in a shell of this name; it finds the command as a user does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
    return subprocess.run(
        [shell, "-c", f"{script}\n:"],  # not the last command: that would take the place of the shell
        env={"PATH": path, "HOME": str(home)}, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("shell", PROPOSALS)
def test_the_script_is_that_of_the_shell_that_asks_for_it(shell: str, tmp_path: Path) -> None:
    # Not every machine has all of them, and what counts is the name of the process.
    (tmp_path / shell).symlink_to(BASH)
    script = run_in(tmp_path / shell, "meterfall --show-completion", tmp_path)
    assert f"_METERFALL_COMPLETE=complete_{shell}" in script
    assert "python" not in script
    assert script == run_in(tmp_path / shell, f"{sys.executable} -m worker --show-completion", tmp_path)


@pytest.mark.parametrize("shell", PROPOSALS)
@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("meterfall ho", ["holds"]),
        ("meterfall partition ", ["pause", "resume", "move", "list"]),
        ("meterfall check user-42 --b", ["--backend"]),
        ("meterfall dead list --reason bad_s", ["bad_signature", "bad_source"]),
    ],
)
def test_commands_options_and_choices_are_proposed(bare: Meterfall, shell: str, line: str, proposed: list[str]) -> None:
    answer = bare.done(**question(shell, line)).rstrip("\n)'").splitlines()
    found = [re.fullmatch(PROPOSALS[shell], each) for each in answer]
    assert [each and each[1] for each in found] == proposed


def test_bash_completes_once_it_is_installed(tmp_path: Path) -> None:
    assert "bash completion installed" in run_in(Path(BASH), "meterfall --install-completion", tmp_path)
    ask = ". ~/.bashrc; COMP_WORDS=(meterfall catalogue d); COMP_CWORD=2; _meterfall_completion meterfall"
    assert run_in(Path(BASH), f'{ask}; echo "${{COMPREPLY[@]}}"; complete -p meterfall', tmp_path).splitlines() == [
        "diff",
        "complete -o default -F _meterfall_completion meterfall",
    ]
