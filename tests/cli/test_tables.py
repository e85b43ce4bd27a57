"""Tables on a terminal: nothing is cut off, and nothing that a terminal would obey."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from config.settings import Settings
from tests.support.commands import METER, USER, Meterfall, lines_of
from tests.support.streams import drain
from tests.support.terminal import on_terminal


def test_no_table_cuts_anything_off_however_narrow_the_terminal(meterfall: Meterfall) -> None:
    key = "order-" + "0123456789" * 6
    meterfall.done("account", "open", USER, "basic", "--period-end", "2036-12-01T00:00:00Z")
    meterfall.done("account", "grant", USER, METER, "123456789", "--key", key)
    expected = {
        ("account", "list"): (USER, "basic", METER, "123,456,789", "123,556,789", "2036-12-0100:00:00UTC"),
        ("account", "show", USER): (METER, "100,000", "123,456,789", "2036-12-0100:00:00UTC"),
        ("usage", USER): ("purchased", METER, "123,456,789", "123,556,789", "2036-12-0100:00:00UTC"),
        ("usage", USER, "--timeline"): (f"grant:{key}", "purchased123456789", "open_meter"),
        ("plans",): ("server_kokoro", "subscription", "10,000,000", "rollover_cap"),
    }
    for command, parts in expected.items():
        for columns in (60, 76, 80, 100):
            table = meterfall.done(*command, COLUMNS=str(columns))
            assert max(map(len, table.splitlines()[1:])) <= columns, command
            assert "…" not in table, command
            cells = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if line[0] in "│┃"]
            text = "".join(itertools.chain.from_iterable(itertools.zip_longest(*cells, fillvalue="")))
            missing = [part for part in parts if part not in text.replace(" ", "")]
            assert missing == [], (command, columns)


def test_a_table_shows_what_a_terminal_would_obey(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic")
    voice = "\x1b[2J[red]用户\n"
    meterfall.done(
        "emit",
        "-",
        stdin=lines_of(
            {"user_id": USER, "event_id": "e", "meter": METER, "quantity": 1, "dimensions": {"voice_slug": voice}}
        ),
    )
    drain(settings, USER)
    table = meterfall.done("usage", USER, "--breakdown")
    assert r"\x1b[2J[red]用户\n" in table
    assert "\x1b" not in table


def test_no_word_is_broken_at_80_columns(settings: Settings, meterfall: Meterfall) -> None:
    meterfall.done("account", "open", USER, "basic", "--period-end", "2036-12-01T00:00:00Z")
    meterfall.done("account", "grant", USER, METER, "123456789", "--key", "order-9", "--reason", "a gift of the house")
    meterfall.done("emit", "--raw", "-", stdin='{"user_id": "user-42", "event_id": "e1", "extraordinary_field": 1}')
    meterfall.done("partition", "pause", "3", "--reason", "looking into an extraordinary producer", "--by", "jane")
    meterfall.done("partition", "resume", "3", "--by", "jane")
    drain(settings, USER)
    for command in (
        ("account", "list"), ("account", "show", USER), ("usage", USER), ("usage", USER, "--timeline"), ("plans",),
        ("dead", "list"), ("partition", "list"), ("catalogue", "list"),
    ):  # fmt: skip
        wide, narrow = (meterfall.done(*command, COLUMNS=columns) for columns in ("100000", "80"))
        words = {word for line in wide.splitlines() if line[0] == "│" for word in re.split(r"[│┃\s]+", line)}
        lines = [re.split(r"[│┃\s]+", line) for line in narrow.splitlines()]
        broken = {word for word in words if len(word) <= 40} - {word for line in lines for word in line}
        assert broken == set(), command
        assert max(map(len, narrow.splitlines()[1:])) <= 80, command


# ---------------------------------------------------------------------------------------------------------------------
# The pager


@pytest.fixture
def pager(tmp_path: Path) -> Path:
    """A pager that writes a line of its own, LESS and what it shows."""
    path = tmp_path / "pager"
    path.write_text('#!/bin/sh\necho "paged with LESS=$LESS $1"\ncat\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def test_a_list_longer_than_the_terminal_is_shown_by_the_pager(bare: Meterfall, pager: Path) -> None:
    def shown(*arguments: str, lines: int = 10, stdout_piped: bool = False, **environment: str) -> str:
        done = on_terminal(
            list(arguments), bare.environment | environment, columns=120, lines=lines, stdout_piped=stdout_piped
        )
        assert done.code == 0
        assert "basic" in done.screen + done.piped
        return done.screen + done.piped

    assert "paged with LESS=FRX " in shown("plans", PAGER=str(pager))
    assert "paged with LESS=R -x" in shown("plans", PAGER=f"{pager} -x", LESS="R")
    assert "paged" in shown("plans", METERFALL_PAGER=str(pager), PAGER="no-such-pager")
    assert "paged" not in shown("plans", METERFALL_PAGER="cat", PAGER=str(pager))
    assert "paged" not in shown("--no-pager", "plans", METERFALL_PAGER=str(pager))
    assert "paged" not in shown("plans", lines=500, PAGER=str(pager)), "it fits the screen"
    assert "paged" not in shown("plans", stdout_piped=True, PAGER=str(pager)), "stdout is no terminal"
    assert "plan" in shown("plans", PAGER="no-such-pager"), "without the program it is printed"
