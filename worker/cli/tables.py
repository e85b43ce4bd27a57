"""Tables on a terminal. No cell is cut off, however narrow it is."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

# Text columns may become so narrow before rows are shown as blocks, and a record has so many columns.
_TEXT_WIDTH, _FIELD_COLUMNS = 9, 2
_UNBOUNDED = 100_000


def print_table(cells: Sequence[Mapping[str, str]], numbers: Collection[str]) -> None:
    """Print rows of text; `numbers` names the columns whose cells stay in one line.

    Where the terminal is too narrow for that, empty columns are left out, and then each row stands as a block of its
    own.
    """
    console = Console(markup=False, emoji=False)  # a cell may quote what somebody sent
    if not console.is_terminal and "COLUMNS" not in os.environ and len(cells[0]) > _FIELD_COLUMNS:
        console.width = _UNBOUNDED  # nobody reads a file or a pipe by the width of a screen
    filled = [name for name in cells[0] if any(row[name] for row in cells)]
    for names in (list(cells[0]), filled):
        if _least_width(cells, names, numbers) <= console.width:
            console.print(_table(cells, names, numbers))
            return
    console.print(_blocks(cells, filled))


def _least_width(cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: Collection[str]) -> int:
    """How wide a table is at the least: numbers stay in one line, text may break."""
    widths = {name: max(cell_len(name), *(cell_len(row[name]) for row in cells)) for name in names}
    least = [width if name in numbers else min(width, _TEXT_WIDTH) for name, width in widths.items()]
    return sum(least) + 3 * len(least) + 1


def _table(cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: Collection[str]) -> Table:
    table = Table()
    for name in names:
        number = name in numbers
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _blocks(cells: Sequence[Mapping[str, str]], names: Sequence[str]) -> Table:
    """Each row as lines of field and value, with a rule behind it."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in cells:
        for name in names:
            table.add_row(name, row[name], end_section=name == names[-1])
    return table
