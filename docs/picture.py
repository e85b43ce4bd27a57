"""Draw `docs/demo.svg`, the picture of the README, from the numbers of a demo run.

    python docs/picture.py              run `meterfall demo --json`, which takes about a minute, and draw it
    python docs/picture.py run.json     draw the JSON of an earlier run; `-` reads it from standard input

The SVG carries its numbers in `<metadata>`: drawing them again gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from worker.version import read_version

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("demo.svg")

# Column heading, its field in the report, its colour (told apart by colour-blind readers also).
BUCKETS = (
    ("subscription", "from_subscription", "#0072b2"),
    ("rollover", "from_rollover", "#009e73"),
    ("purchased", "from_purchased", "#e69f00"),
    ("debt", "overflow_to_debt", "#d55e00"),
)
_WIDTH, _MARGIN = 860, 24
_BOX_WIDTH, _BOX_GAP, _BOX_HEIGHT = 182, 28, 66
_BAR_X, _BAR_WIDTH, _ROW_HEIGHT = 200, 216, 26
_COLUMN_WIDTH = 105
# A card of its own keeps the text readable on any page; the dark one is for readers who prefer dark.
_STYLE = """
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 13px; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d1d9e0 }
.box { fill: #f0f3f6 }
.head { font-size: 17px; font-weight: 600 }
.number { font-size: 24px; font-weight: 600 }
.soft { fill: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .card { fill: #161b22; stroke: #3d444d }
  .box { fill: #262c36 }
  .soft { fill: #b1bac4 }
}
"""


class PictureError(ValueError):
    """The run cannot be drawn; the message says why."""


def figures(run: Mapping[str, Any], release: str, day: str) -> dict[str, Any]:
    """Return the picture's figures of a report of `meterfall demo --json`, with the release and the day of the run.

    Raises PictureError if the report lacks a number, found a fault, or does not add up.
    """
    try:
        shown = {
            "release": release,
            "day": day,
            **{name: run[name] for name in ("postgres", "redis", "seed", "operations", "entries", "recorded")},
            "repeated": run["repeated"],
            "dead_letters": sum(run["dead_letters"].values()),
            "denied": sum(run["denied"].values()),
            "accounts": run["verified_accounts"],
            "changes": run["verified_changes"],
            "usage": [
                {name: line[name] for name in ("plan", "meter", "amount", *(field for _, field, _ in BUCKETS))}
                for line in run["usage"]
            ],
        }
        faults = run["faults"]
    except KeyError as missing:
        raise PictureError(f"the report has no {missing}: is it one of `meterfall demo --json`?") from None
    if faults:
        raise PictureError(f"the run found a fault: {faults[0]}")
    if shown["entries"] != shown["recorded"] + shown["repeated"] + shown["dead_letters"]:
        raise PictureError("entries are not events, repeats and dead letters")
    for line in shown["usage"]:
        if line["amount"] != sum(line[field] for _, field, _ in BUCKETS):
            raise PictureError(f"{line['plan']} {line['meter']}: the buckets do not sum to the amount")
    return shown


def drawn(shown: Mapping[str, Any]) -> str:
    """Return the SVG of these figures. The same figures give the same text."""
    spilled = [line for line in shown["usage"] if line["amount"] > line["from_subscription"]]
    table_top = 276
    below = table_top + _ROW_HEIGHT * (len(spilled) + 1)
    height = below + 72
    counts = (
        (shown["entries"], "stream entries"),
        (shown["recorded"], "events applied once"),
        (shown["repeated"], "repeats dropped"),
        (shown["dead_letters"], "dead letters kept"),
    )
    changes = f"{shown['changes']:,} changes of {shown['accounts']:,} accounts"
    alone = len(shown["usage"]) - len(spilled)
    title = "One run of meterfall demo: every stream entry accounted for, every unit paid by a bucket"
    summary = ", ".join(f"{count:,} {what}" for count, what in counts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(_in_words(shown, spilled, summary))}</desc>',
        f"<metadata>{escape(json.dumps(shown))}</metadata>",
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
        _text(_MARGIN, 36, "Every stream entry is accounted for", "head"),
        *_boxes(counts, 54),
        _text(_MARGIN, 146, f"{shown['denied']:,} checks said no before the work began."),
        _text(_MARGIN, 166, f"The proof replayed {changes}: 0 differences."),
        _text(_MARGIN, 208, "Every unit is paid by a bucket, from left to right", "head"),
        _text(
            _MARGIN,
            228,
            "Units by plan and meter. Finished work is never refused; the uncovered rest becomes debt.",
            "soft",
        ),
        *_headings(table_top - 16),
        *(part for row, line in enumerate(spilled) for part in _row(line, table_top + _ROW_HEIGHT * row)),
        _text(
            _MARGIN,
            below - 4,
            f"Of {len(shown['usage'])} pairs of plan and meter, {alone} spilled nothing: subscription paid all.",
            "soft",
        ),
        _text(
            _MARGIN,
            height - 40,
            f"meterfall demo --json: {shown['operations']:,} pieces of work, seed {shown['seed']}",
            "soft",
        ),
        _text(_MARGIN, height - 22, f"{shown['day']}, meterfall {shown['release']}, {_servers(shown)}", "soft"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _boxes(counts: Sequence[tuple[int, str]], top: int) -> list[str]:
    """Return the sum of all stream entries: a box for each term, and the signs between them."""
    parts = []
    for place, (count, what) in enumerate(counts):
        left = _MARGIN + place * (_BOX_WIDTH + _BOX_GAP)
        middle = left + _BOX_WIDTH // 2
        parts += [
            f'<rect class="box" x="{left}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6"/>',
            _text(middle, top + 32, f"{count:,}", "number", "middle"),
            _text(middle, top + 53, what, "soft", "middle"),
        ]
        if place:
            parts.append(_text(left - _BOX_GAP // 2, top + 40, "=" if place == 1 else "+", "number", "middle"))
    return parts


def _headings(baseline: int) -> list[str]:
    """Return the names of the buckets over their columns, each underlined in its colour."""
    parts = []
    for place, (name, _, colour) in enumerate(BUCKETS):
        right, width = _column(place), _COLUMN_WIDTH - 12
        parts += [
            _text(right, baseline, f"→ {name}" if place else name, "", "end"),
            f'<rect x="{right - width}" y="{baseline + 6}" width="{width}" height="3" fill="{colour}"/>',
        ]
    return parts


def _row(line: Mapping[str, Any], top: int) -> list[str]:
    """Return one plan and meter: its name, the bar of shares, and the units of each bucket."""
    parts = [_text(_MARGIN, top + 15, f"{line['plan']} · {line['meter']}")]
    left = float(_BAR_X)
    for place, (_, field, colour) in enumerate(BUCKETS):
        width = _BAR_WIDTH * line[field] / line["amount"]
        if width:
            parts.append(f'<rect x="{left:.1f}" y="{top + 3}" width="{width:.1f}" height="15" fill="{colour}"/>')
        parts.append(_text(_column(place), top + 15, f"{line[field]:,}", "", "end"))
        left += width
    return parts


def _column(place: int) -> int:
    """Return the right end of a bucket's numbers."""
    return _WIDTH - _MARGIN - _COLUMN_WIDTH * (len(BUCKETS) - 1 - place)


def _servers(shown: Mapping[str, Any]) -> str:
    """Return name and version of both servers."""
    return ", ".join(" ".join(shown[name].split()[:2]) for name in ("postgres", "redis"))


def _in_words(shown: Mapping[str, Any], spilled: Sequence[Mapping[str, Any]], summary: str) -> str:
    """Return the picture in words, for readers who cannot see it."""
    lines = [f"{summary}.", f"{shown['denied']:,} checks said no before the work began."]
    for line in spilled:
        paid = ", ".join(f"{name} {line[field]:,}" for name, field, _ in BUCKETS)
        lines.append(f"Plan {line['plan']}, meter {line['meter']}: {paid}.")
    return " ".join(lines)


def _text(x: int, baseline: int, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return a line of text; `anchor` names its end, or its middle, at `x`."""
    name = f' class="{kind}"' if kind else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x}" y="{baseline}"{name}{place}>{escape(words)}</text>'


def read_run(source: str | None) -> Mapping[str, Any]:
    """Return the report of a run: from a file, from standard input (`-`), or from a new demo run.

    Raises PictureError for text that is not a report.
    """
    if source is None:
        command = [sys.executable, "-m", "worker", "demo", "--json"]
        text = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    try:
        run = json.loads(text)
    except ValueError as error:
        raise PictureError(f"not JSON: {error}") from None
    if not isinstance(run, dict):
        raise PictureError("not a report of `meterfall demo --json`")
    return run


def main() -> None:
    """Read a run, draw it, and print the path of the picture."""
    parser = argparse.ArgumentParser(description="Draw the picture of the README from a demo run.")
    parser.add_argument("run", nargs="?", help="JSON of an earlier run, - for standard input; default: run the demo")
    parser.add_argument("--day", default=f"{datetime.now(UTC):%Y-%m-%d}", help="day of the run; default today, UTC")
    parser.add_argument("--out", type=Path, default=PICTURE, help=f"default {PICTURE.relative_to(ROOT)}")
    options = parser.parse_args()
    try:
        text = drawn(figures(read_run(options.run), read_version(), options.day))
    except PictureError as error:
        sys.exit(f"picture: {error}")
    options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{options.out}\n")


if __name__ == "__main__":
    main()
