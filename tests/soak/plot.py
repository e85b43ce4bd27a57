"""The picture of a soak: throughput, lag and memory over time, the faults marked. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plot import ACCENT, MISSED, NEUTRAL, REACHED
from tests.soak.report import RECOVERY_BOUND_SECONDS, Report

_COLOURS = {"SIGKILL": MISSED, "SIGQUIT": MISSED, "SIGTERM": ACCENT, "SIGINT": ACCENT}


def draw(report: Report, path: Path) -> None:
    """Draw all panels into the PNG `path`."""
    figure = Figure(figsize=(14, 10), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 3, 2])
    throughput, lag, memory, recovery = panels
    _line(throughput, report.throughput(), ACCENT, "entries disposed of a second")
    _line(
        lag, [(s.at, s.lag) for s in report.samples if s.lag is not None], ACCENT, "stream entries waiting (log scale)"
    )
    lag.set_yscale("symlog", linthresh=10)
    lag.set_ylim(bottom=0)
    for name, colour in (("worker", ACCENT), ("supervisor", NEUTRAL)):
        points = [(s.at, median(s.memory[name])) for s in report.samples if s.memory[name]]
        _line(memory, points, colour, "resident memory, MB (median of the processes)", name)
    memory.set_ylim(bottom=0)
    memory.legend(frameon=False, fontsize=9, loc="lower right")
    _draw_recoveries(recovery, report)
    for panel in panels:
        for fault in report.faults:
            colour = _COLOURS.get(fault.kind.split()[0], NEUTRAL)
            panel.axvline(fault.at, color=colour, linewidth=0.7, alpha=0.45, zorder=0)
        for quiet in report.quiets:
            panel.axvspan(quiet.at, quiet.at + quiet.seconds + quiet.proof_seconds, color=REACHED, alpha=0.25, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    recovery.set_xlabel("seconds; red lines: killed, blue: told to end, grey: other faults, green: quiet points")
    verdict = "passed" if not report.failures() else f"FAILED: {len(report.failures())} findings"
    figure.suptitle(
        f"meterfall soak, seed {report.seed}: {report.events:,} events, {len(report.faults)} faults, "
        f"{len(report.quiets)} quiet points, {verdict}\n{report.postgres}, {report.redis}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _line(panel: Any, points: list[Any], colour: str, title: str, label: str | None = None) -> None:
    if points:
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, label=label)
    panel.set_title(title, fontsize=11, loc="left")


def _draw_recoveries(panel: Any, report: Report) -> None:
    """Draw one dot per fault: seconds until work went on. Faults with a bound are filled."""
    for bounded, face in ((True, ACCENT), (False, "none")):
        found = [f for f in report.faults if f.seconds is not None and f.bounded == bounded]
        colours = [MISSED if bounded and (f.seconds or 0) > RECOVERY_BOUND_SECONDS else face for f in found]
        panel.scatter(
            [f.at for f in found], [f.seconds for f in found], s=26, color=colours if bounded else None,
            facecolors=None if bounded else "none", edgecolors=ACCENT if bounded else NEUTRAL,
            label="with a bound" if bounded else "others",
        )  # fmt: skip
    panel.axhline(RECOVERY_BOUND_SECONDS, color=MISSED, linewidth=1, linestyle="--")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=9, loc="upper right")
    panel.set_title("seconds until work went on after each fault", fontsize=11, loc="left")
