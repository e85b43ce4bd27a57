"""The commands as a whole: how they are started, and what the help lists."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.commands import MODULE, Meterfall, assert_refused


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
        "verify", "status",
    ):  # fmt: skip
        assert f" {command} " in text
    without = bare()
    assert (without.code, without.err) == (2, "")
    assert "Usage:" in without.out
