"""The question before a command that moves or destroys much. One rule for all of them:

Up to METERFALL_CONFIRM_AMOUNT_UNITS units or METERFALL_CONFIRM_ITEMS things, nobody is asked. Above, the command says
before → after, or the count, and asks on a terminal; `--yes` answers beforehand. Without a terminal a change that a
later command can put right goes on, as scripts expect. One that is final, since no command brings back what it takes,
is refused until it says `--yes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import typer

from worker.cli.errors import fail
from worker.cli.io import REFUSED
from worker.errors import BadInput

if TYPE_CHECKING:
    from worker.resources import Resources
    from worker.rules.account import Change

T = TypeVar("T")

_BUCKETS = ("used", "rollover", "purchased")


def on_terminal() -> bool:
    """Return True if somebody can be asked: the question goes to stderr, the answer comes from stdin."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(what: str, *, yes: bool, is_final: bool) -> None:
    """Ask whether to go on with `what`, a sentence about what would happen; with `yes`, do not.

    On a no the command ends with exit code 1. Without a terminal, raises BadInput if it `is_final`, else goes on.
    """
    if yes:
        return
    if not on_terminal():
        if is_final:
            raise BadInput(f"{what}; nothing was done. Say --yes to go on")
        return
    if not typer.confirm(f"{what}. Go on?", err=True):
        fail("nothing was done", REFUSED)


def asks(*, yes: bool, is_final: bool) -> bool:
    """Return True if `confirm` would do anything: its sentence may cost a look at the servers."""
    return not yes and (is_final or on_terminal())


class _ToConfirm(Exception):
    """A change that moves much; it was not made."""


def confirmed(
    resources: Resources, change: Callable[[Resources], T], *, yes: bool, always: bool = False, is_final: bool = False
) -> T:
    """Make a change of accounts, and return its answer; first ask if it moves many units, or `always`.

    The question shows the balances under the accounts' locks, but nothing is locked while it waits for an answer.
    Raises the errors of `change` and of `confirm`.
    """
    if not asks(yes=yes, is_final=is_final):
        return change(resources)
    limit = -1 if always else resources.settings.confirm_amount_units

    def review(changes: Sequence[tuple[str, Sequence[Change]]]) -> None:
        moved = [_moved(step) for _, steps in changes for step in steps]
        if max((abs(after - before) for each in moved for before, after in each.values()), default=0) > limit:
            raise _ToConfirm("; ".join(_in_words(user_id, steps) for user_id, steps in changes if steps))

    try:
        return change(resources.reviewed(review))
    except _ToConfirm as found:
        confirm(str(found), yes=False, is_final=is_final)
    return change(resources)


def _moved(step: Change) -> dict[str, tuple[int, int]]:
    """Return the buckets that a step of one meter moves: units before and after."""
    if step.before is None or step.after is None:
        return {}
    pairs = {name: (getattr(step.before, name), getattr(step.after, name)) for name in _BUCKETS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _in_words(user_id: str, steps: Sequence[Change]) -> str:
    """Say what a command does to one account: `close user-42: premium_voice purchased 5,000 → 0`."""
    meters = [
        f"{step.meter} " + ", ".join(f"{name} {before:,} → {after:,}" for name, (before, after) in moved.items())
        for step in steps
        if (moved := _moved(step))
    ]
    kind = steps[-1].kind.replace("_", " ")
    return f"{kind} {user_id}: {'; '.join(meters)}" if meters else f"{kind} {user_id}"
