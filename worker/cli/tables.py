"""Tables on a terminal. No cell is cut off, even on a narrow one."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

# The narrowest text column before rows become blocks, and the number of columns of a record.
_TEXT_WIDTH, _FIELD_COLUMNS = 9, 2
_UNBOUNDED = 100_000


def print_table(cells: Sequence[Mapping[str, str]], numbers: Collection[str]) -> None:
    """Print rows of text; cells of the columns in `numbers` stay in one line.

    On a terminal too narrow for that, leave out empty columns; if that is not enough, print each row as a block.
    """
    console = Console(markup=False, emoji=False)  # a cell may quote a sender
    if not console.is_terminal and "COLUMNS" not in os.environ and len(cells[0]) > _FIELD_COLUMNS:
        console.width = _UNBOUNDED  # a file or a pipe has no width
    filled = [name for name in cells[0] if any(row[name] for row in cells)]
    for names in (list(cells[0]), filled):
        if _least_width(cells, names, numbers) <= console.width:
            console.print(_table(cells, names, numbers))
            return
    console.print(_blocks(cells, filled))


def _least_width(cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: Collection[str]) -> int:
    """Return the least width of a table: numbers stay in one line, text may break."""
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
    """Return each row as lines of field and value, with a rule after it."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in cells:
        for name in names:
            table.add_row(name, row[name], end_section=name == names[-1])
    return table
