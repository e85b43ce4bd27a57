"""Publish a run of the bench: `python -m benchmarks.publish out/bench.json` in the root of the checkout.

It keeps the result as docs/benchmarks.json, and makes docs/benchmarks.md and the block of figures in README.md from it.
Nobody writes a figure by hand: a test makes both again and compares. Without an argument it makes them from the result
that is kept, after a change of words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from benchmarks.bench import CHECKOUT, TARGETS, in_short
from benchmarks.cpu import PARTS
from benchmarks.plot import CONSUMERS, TARGET_LABELS

BEGIN, END = "<!-- figures of `make bench`: do not edit -->", "<!-- end of these figures -->"
RESULT = "docs/benchmarks.json"
PAGE = "docs/benchmarks.md"
README = "README.md"
_WIDTH = 120
# Other programs' share of the CPU, in percent, from which a machine was not quiet.
_NOT_QUIET = 10
# Figures without a target that the page tells.
_MORE_LABELS = {
    "drain_over_batched": "drain ÷ batched consumer",
    "check_over_ping": "check ÷ PING, median",
    "ping_p50_us": "PING, median [µs]",
    "check_p50_us": "check, median [µs]",
    "reserve_p50_us": "reserve, median [µs]",
    "grants_due_longest_ms": "the longest transaction of it [ms]",
    "grants_due_grown_mb": "growth of its memory [MB]",
    "emit_per_s": "emit, one at a time, one process [events/s]",
    "emit_pipelined_per_s": "emit, many at a time, one process [events/s]",
}

Result = Mapping[str, Any]

_QUICK = (
    "**A quick run made these figures: one small round, which measures the start as much as the work.\n"
    "They show that the bench works. They do not show what meterfall costs.**"
)
_HOW_THEY_COMPARE = """
All four bill the same kind of events into the same tables of the same Postgres, by the same rules, and wait for the
disk at each COMMIT. A test compares the rows and balances of both peers with those of a worker. The peers do less: they
publish no balance, keep no holds, close no periods and keep no dead letters.

- **batched** takes as many events per batch as a worker, and one transaction for each user of a batch:
  `benchmarks/batched.py`.
- **ORM** takes one transaction for each event: `benchmarks/naive.py`.
"""
_HOW_TO_READ = """
Cells are *least / median / most* of the rounds. CPU is the user and system time of all processes of a part while the
streams empty. Python is the consumer, for meterfall with its supervisor. Postgres is all its backends and background
processes. The figures of meterfall include what 200 checks a second cost the servers meanwhile. The bare COPY writes
the same rows with nothing around it: it is the ceiling of this machine.
"""
_HOW_TO_TRUST = """
Targets are for two cores that do nothing else, and the sizes of `make bench`. Other programs spoil latencies and rates,
ratios less, CPU per event least. `docs/benchmarks.json` has every figure of every round.
"""


def page(result: Result) -> str:
    """Return docs/benchmarks.md: the machine, the consumers side by side, and each figure with a target."""
    machine = result["machine"]
    facts = [
        ["Made by", f"`{machine['command']}`"],
        ["Date", machine["date"]],
        ["meterfall", machine["version"]],
        ["Machine", f"{machine['cores']} cores, {machine['processor']}, {machine['system']}"],
        ["Servers", f"{machine['postgres']}, {machine['redis']}; {_durability(machine)}"],
        ["Rounds", str(machine["rounds"])],
        ["Events of a drain", f"{machine['events']:,} of {machine['users']:,} accounts, few of them heavy"],
        ["Other programs", _others(machine)],
    ]
    parts = [part.capitalize() for part in PARTS]
    consumers = [[label, *_consumer(result, name)] for label, name in CONSUMERS]
    labels = {name: TARGET_LABELS[name] for name in TARGETS} | _MORE_LABELS
    every = [
        [label, *_spread(result, name), str(TARGETS.get(name, "")), _reached(result, name)]
        for name, label in labels.items()
        if name in result
    ]
    sections = [
        "# What it costs",
        "The bench made this page: do not edit it. In a checkout, `make bench` makes it again, with the figures of\n"
        "the README and the picture `out/bench.png`.",
        *([_QUICK] if machine["quick"] else []),
        _table(["", ""], facts),
        "## The consumers side by side",
        _HOW_THEY_COMPARE.strip(),
        _table(["", "CPU per event, µs", *parts, "events/s", "÷ bare COPY"], consumers),
        _HOW_TO_READ.strip(),
        "## All figures with a target, and some without",
        _table(["figure", "least", "median", "most", "target", "reached"], every),
        _HOW_TO_TRUST.strip(),
    ]
    return "\n\n".join(sections) + "\n"


def readme_block(result: Result) -> str:
    """Return the figures of the README, with their marks."""
    machine = result["machine"]
    rows = [
        [label, *(_shown(result, figure) for figure in (*_cpu_figures(name), f"{name}_events_per_s"))]
        for label, name in CONSUMERS
    ]
    value = {name: in_short(figure) for name, figure in result.items() if isinstance(figure, int | float)}
    worth = (
        f"One worker drains at {value['drain_over_copy']} of a bare COPY of the same rows, two workers at "
        f"{value['drain2_over_copy']}. A balance is visible {value['visible500_p50_ms']} ms after its event "
        f"(p99 {value['visible500_p99_ms']} ms) at 500 events a second, and {value['visible_p50_ms']} ms "
        f"(p99 {value['visible_p99_ms']} ms) at 2,000. While workers drain, `check` has a p99 of "
        f"{value['check_draining_p99_ms']} ms. `reserve` takes as long as {value['reserve_over_ping']} PINGs. "
        f"A worker needs {value['worker_rss_mb']} MB at most."
    )
    rounds = "One round" if machine["rounds"] == 1 else f"Medians of {machine['rounds']} rounds"
    servers = f"{machine['postgres']}, {machine['redis']}; {_durability(machine)}"
    made = f"{rounds}, {machine['date']}: {machine['cores']} cores, {servers}."
    if machine.get("others_cpu_percent", 0) >= _NOT_QUIET:
        made += f" {_others(machine)}"
    if machine["quick"]:
        made = f"{_QUICK} {made}"  # fill joins its lines
    table = _table(["", "CPU per event, µs", *(part.capitalize() for part in PARTS), "events/s"], rows)
    return "\n".join([BEGIN, fill(made, _WIDTH), "", table, "", fill(worth, _WIDTH), END])


def with_block(readme: str, block: str) -> str:
    """Return the README with `block` in place of the one it has.

    Raises ValueError if the README has not exactly one.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError(f"{README}: must have one block of figures, between {BEGIN} and {END}")
    return before + block + after


def main() -> None:
    """Keep the result that the command line names, and write what follows from it."""
    kept = CHECKOUT / RESULT
    if len(sys.argv) > 1:
        kept.write_text(Path(sys.argv[1]).read_text(encoding="utf-8"), encoding="utf-8")
    result = json.loads(kept.read_text(encoding="utf-8"))
    (CHECKOUT / PAGE).write_text(page(result), encoding="utf-8")
    readme = CHECKOUT / README
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), readme_block(result)), encoding="utf-8")
    print(f"wrote {RESULT}, {PAGE} and the figures of {README}", file=sys.stderr)


# Leaves --------------------------------------------------------------------------------------------------------------


def _consumer(result: Result, name: str) -> Iterable[str]:
    for figure in (*_cpu_figures(name), f"{name}_events_per_s"):
        yield _of_rounds(result["rounds"].get(figure, []))
    rates, ceilings = (result["rounds"][figure] for figure in (f"{name}_events_per_s", "copy_rows_per_s"))
    yield _of_rounds(list(map(truediv, rates, ceilings)))


def _of_rounds(values: Sequence[float]) -> str:
    """Return least / median / most, of one round its value, of none a dash."""
    if len(values) < 2:
        return in_short(values[0]) if values else "–"
    return " / ".join(map(in_short, (min(values), median(values), max(values))))


def _cpu_figures(name: str) -> list[str]:
    return [f"{name}_cpu_us", *(f"{name}_{part}_cpu_us" for part in PARTS)]


def _spread(result: Result, name: str) -> list[str]:
    """Return the least of the rounds, the figure, the most of them."""
    values = result["rounds"][name]
    return [in_short(value) for value in (min(values), result[name], max(values))]


def _shown(result: Result, name: str) -> str:
    return in_short(result[name]) if name in result else "–"


def _reached(result: Result, name: str) -> str:
    return "" if name not in TARGETS else "yes" if TARGETS[name].reached(result[name]) else "**no**"


def _durability(machine: Mapping[str, Any]) -> str:
    return "each COMMIT waits for the disk" if machine["durable"] else "NOT DURABLE"


def _others(machine: Mapping[str, Any]) -> str:
    percent = machine.get("others_cpu_percent")
    if percent is None:
        return "Nobody measured what other programs took of the CPU."
    if percent < _NOT_QUIET:
        return f"Other programs took {percent} % of the CPU."
    return f"The machine was not quiet: other programs took {percent} % of its CPU, so latencies and rates are worse."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    main()
