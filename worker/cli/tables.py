"""Tables on a terminal. No cell is cut off, even on a narrow one."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from worker.cli.pager import page

# The number of columns of a record.
_FIELD_COLUMNS = 2
_UNBOUNDED = 100_000
# What a table adds to the cells of a column, and of all of them.
_PADDING, _EDGE = 3, 1


def print_table(cells: Sequence[Mapping[str, str]], numbers: Collection[str]) -> None:
    """Print rows of text; cells of the columns in `numbers` stay in one line, and no word of the others is broken.

    On a terminal too narrow for that, leave out empty columns; if that is not enough, print each row as a block. On a
    terminal too short, a pager shows the table.
    """
    console = Console(markup=False, emoji=False)  # a cell may quote a sender
    if not console.is_terminal and "COLUMNS" not in os.environ and len(cells[0]) > _FIELD_COLUMNS:
        console.width = _UNBOUNDED  # a file or a pipe has no width
    with console.capture() as captured:
        console.print(_fitting(cells, numbers, console.width))
    page(captured.get())


def _fitting(cells: Sequence[Mapping[str, str]], numbers: Collection[str], width: int) -> Table:
    filled = [name for name in cells[0] if any(row[name] for row in cells)]
    for names in (list(cells[0]), filled):
        if widths := _widths(cells, names, numbers, width - _EDGE - _PADDING * len(names)):
            return _table(cells, widths, numbers)
    return _blocks(cells, filled)


def _widths(
    cells: Sequence[Mapping[str, str]], names: Sequence[str], numbers: Collection[str], room: int
) -> dict[str, int]:
    """Return the width of each column in so much room; empty if a number or a word would have to be broken."""
    texts = {name: [name, *(row[name] for row in cells)] for name in names}
    widths = {name: max(map(cell_len, told)) for name, told in texts.items()}
    least = {
        name: widths[name] if name in numbers else max(cell_len(word) for text in told for word in text.split() or [""])
        for name, told in texts.items()
    }
    if sum(least.values()) > room:
        return {}
    while (over := sum(widths.values()) - room) > 0:  # the widest gives way, down to the next one
        name = max(widths, key=lambda each: (widths[each] > least[each], widths[each]))
        others = [width for each, width in widths.items() if each != name]
        widths[name] = max(least[name], widths[name] - over, min(widths[name] - 1, max(others, default=0)))
    return widths


def _table(cells: Sequence[Mapping[str, str]], widths: Mapping[str, int], numbers: Collection[str]) -> Table:
    table = Table()
    for name, width in widths.items():
        justify: Literal["right", "left"] = "right" if name in numbers else "left"
        table.add_column(name, justify=justify, width=width, no_wrap=name in numbers, overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in widths))
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
