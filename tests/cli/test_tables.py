"""Tables on a terminal: nothing is cut off, and nothing that a terminal would obey."""

from __future__ import annotations

import itertools
import re

from config.settings import Settings
from tests.support.commands import METER, USER, Meterfall, lines_of
from tests.support.streams import drain


def test_no_table_cuts_anything_off_however_narrow_the_terminal(meterfall: Meterfall) -> None:
    key = "order-" + "0123456789" * 6
    meterfall.done("account", "open", USER, "basic", "--period-end", "2036-12-01T00:00:00Z")
    meterfall.done("account", "grant", USER, METER, "123456789", "--key", key)
    expected = {
        ("account", "list"): (USER, "basic", METER, "123456789", "123556789", "2036-12-0100:00:00Z"),
        ("account", "show", USER): (METER, "100000", "123456789", "2036-12-0100:00:00Z"),
        ("usage", USER): ("purchased", METER, "123456789", "123556789", "2036-12-0100:00:00Z"),
        ("usage", USER, "--timeline"): (f"grant:{key}", "purchased123456789", "open_meter"),
        ("plans",): ("server_kokoro", "subscription", "10000000", "rollover_cap"),
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
