"""The picture of a benchmark: targets reached, CPU per event, throughput, latencies. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

REACHED, MISSED, NEUTRAL, ACCENT = "#2f7d5b", "#c0563b", "#8a94a6", "#33608f"

# Told apart by colour-blind readers also, and as greys.
_CPU_COLOURS = {"python": "#0072b2", "postgres": "#e69f00", "redis": "#b3408a"}
# Label and name of each consumer, in the order of the picture and of docs/benchmarks.md.
CONSUMERS = (
    ("meterfall, one worker", "drain"),
    ("meterfall, two workers", "drain2"),
    ("batched: a transaction a user", "batched"),
    ("ORM: a transaction an event", "naive"),
)
# Label, median and 99th percentile in microseconds: figure and factor each.
_LATENCIES = (
    ("PING, idle", "ping_p50_us", "ping_p99_us", 1),
    ("check, idle", "check_p50_us", "check_p99_us", 1),
    ("reserve, idle", "reserve_p50_us", "reserve_p99_us", 1),
    ("charge, idle", "charge_p50_us", "charge_p99_us", 1),
    ("decide (free), idle", "decide_free_p50_us", "decide_free_p99_us", 1),
    ("check while draining", "check_draining_p50_ms", "check_draining_p99_ms", 1_000),
    ("visible balance at 500/s", "visible500_p50_ms", "visible500_p99_ms", 1_000),
    ("visible balance at 2,000/s", "visible_p50_ms", "visible_p99_ms", 1_000),
)
_THROUGHPUTS = (
    ("bare COPY, 2,000 rows a commit", "copy_rows_per_s", NEUTRAL),
    ("drain, two workers", "drain2_events_per_s", ACCENT),
    ("drain, one worker", "drain_events_per_s", ACCENT),
    ("batched, a transaction a user", "batched_events_per_s", NEUTRAL),
    ("ORM, a transaction an event", "naive_events_per_s", NEUTRAL),
    ("emit, pipelined", "emit_pipelined_per_s", ACCENT),
    ("emit, single", "emit_per_s", ACCENT),
    ("decide and settle, one process", "decisions_per_s", ACCENT),
)
TARGET_LABELS = {
    "drain_cpu_us": "CPU per event, one worker, all parts [µs]",
    "drain_over_copy": "drain ÷ COPY, one worker",
    "drain2_over_copy": "drain ÷ COPY, two workers",
    "drain_over_naive": "drain ÷ ORM consumer",
    "signed_over_unsigned": "drain, signed ÷ unsigned",
    "reserve_over_ping": "reserve ÷ PING, median",
    "decide_free_over_ping": "decide (free) ÷ PING, median",
    "async_reserve_per_core_s": "reserves/s per core, asyncio",
    "async_reserve_1000_granted": "granted of 1,000 reserves at once, asyncio",
    "hung_redis_first_check_ms": "first check of a frozen Redis [ms]",
    "hung_redis_check_p99_ms": "checks after it, p99 [ms]",
    "spool_recovery_s": "as before after an outage of 20 s [s]",
    "decisions_per_s": "decisions of one pool a second",
    "check_draining_p99_ms": "check while draining, p99 [ms]",
    "visible500_p50_ms": "event → balance at 500/s, median [ms]",
    "visible500_p99_ms": "event → balance at 500/s, p99 [ms]",
    "visible_p50_ms": "event → balance at 2,000/s, median [ms]",
    "visible_p99_ms": "event → balance at 2,000/s, p99 [ms]",
    "worker_rss_mb": "peak memory of a worker [MB]",
    "boundary_batch_ratio": "batch across boundaries ÷ plain batch",
    "renew_due_seconds": "renew_due, all due accounts [s]",
    "grants_due_seconds": "as many grants that end at once [s]",
    "granted_batch_ratio": "batch from three grants ÷ plain batch",
    "limited_reserve_p50_ratio": "reserve, three limits ÷ none, median",
    "limited_reserve_cpu_ratio": "reserve, three limits ÷ none, CPU",
    "noticed_batch_cpu_ratio": "batch, 1 % reach a line ÷ none, CPU",
    "deliveries_per_s": "notices delivered a second, one sender",
    "http_check_over_check": "POST /v1/check ÷ check, median",
    "http_check_p99_ms": "POST /v1/check, 64 callers, p99 [ms]",
    "http_events_per_s": "events a second by POST /v1/events",
}


def draw(figures: Mapping[str, float], machine: Mapping[str, Any], targets: Mapping[str, Any], path: Path) -> None:
    """Draw all panels into the PNG `path`; none of CPU if it could not be measured."""
    has_cpu = f"{CONSUMERS[0][1]}_cpu_us" in figures
    rows: Any = [["targets"] * 2, *([["cpu", "near"]] if has_cpu else []), ["throughput", "latency"]]
    heights = [1.3, *([0.55] if has_cpu else []), 1]
    figure = Figure(figsize=(12, 13), layout="constrained")
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    _draw_targets(panels["targets"], figures, targets)
    if has_cpu:
        _draw_cpu(panels["cpu"], figures, CONSUMERS, "CPU per event [µs], all processes of each part")
        panels["cpu"].legend(frameon=False, fontsize=9, loc="upper right")
        _draw_cpu(panels["near"], figures, CONSUMERS[:2], "The same of meterfall alone")
    _draw_throughput(panels["throughput"], figures)
    _draw_latency(panels["latency"], figures)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.suptitle(
        f"meterfall bench: {machine['events']:,} events of {machine['users']:,} skewed users, "
        f"{_rounds(machine['rounds'])}\n{machine['cores']} cores, {machine['postgres']}, {machine['redis']}"
        f"{'' if machine['durable'] else ', NOT DURABLE'}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _draw_targets(panel: Any, figures: Mapping[str, float], targets: Mapping[str, Any]) -> None:
    """Draw the ratio of each figure to its target: 1 is the target, to the right is better."""
    labels, margins, notes, colours = [], [], [], []
    for name, target in targets.items():
        if name not in figures:
            continue
        value = figures[name]
        labels.append(TARGET_LABELS[name])
        margins.append(value / target.value if target.at_least else target.value / value)
        shown = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
        notes.append(f"{shown}  (target {target})")
        colours.append(REACHED if target.reached(value) else MISSED)
    panel.barh(labels, [margin - 1 for margin in margins], left=1, color=colours, height=0.62)
    panel.axvline(1, color="black", linewidth=1.2)
    for row, (margin, note) in enumerate(zip(margins, notes, strict=True)):
        panel.text(max(1.0, margin), row, f"  {note}", va="center", fontsize=9)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlim(min([0.5, *(margin * 0.9 for margin in margins)]), max(2.0, max(margins)) * 2.2)
    _plain_ticks(panel, (0.25, 0.5, 1, 2, 4, 8, 16, 32), "×")
    panel.set_title(
        "Targets: 1× is just reached, green bars are beyond it, red ones fall short (log scale)",
        fontsize=11,
        loc="left",
    )


def _draw_cpu(panel: Any, figures: Mapping[str, float], consumers: Sequence[tuple[str, str]], title: str) -> None:
    """Draw a bar for each consumer, its parts side by side."""
    longest = max(figures[f"{name}_cpu_us"] for _, name in consumers)
    for row, (_, name) in enumerate(consumers):
        left = 0.0
        for part, colour in _CPU_COLOURS.items():
            width = figures[f"{name}_{part}_cpu_us"]
            panel.barh([row], [width], left=left, color=colour, height=0.62, label=None if row else part.capitalize())
            if width > longest * 0.08:
                middle = left + width / 2
                panel.text(middle, row, f"{width:,.0f}", va="center", ha="center", color="white", fontsize=9)
            left += width
        panel.text(left, row, f"  {left:,.0f} µs", va="center", fontsize=9)
    panel.set_yticks(range(len(consumers)), [label for label, _ in consumers])
    panel.invert_yaxis()
    panel.set_xlim(0, longest * 1.25)
    panel.grid(axis="x", color="#e3e6ea")
    panel.set_axisbelow(True)
    panel.set_title(title, fontsize=11, loc="left")


def _draw_throughput(panel: Any, figures: Mapping[str, float]) -> None:
    labels, names, colours = zip(*_THROUGHPUTS, strict=True)
    values = [figures[name] for name in names]
    panel.barh(labels, values, color=colours, height=0.62)
    for row, value in enumerate(values):
        panel.text(value, row, f"  {value:,.0f}", va="center", fontsize=9)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlim(min(50, *(value / 2 for value in values)), max(values) * 4)
    _plain_ticks(panel, (100, 1_000, 10_000, 100_000), "")
    panel.set_title("Rows, events and decisions per second (log scale)", fontsize=11, loc="left")


def _draw_latency(panel: Any, figures: Mapping[str, float]) -> None:
    """Draw median and 99th percentile as the two ends of a line."""
    for row, (_, median, tail, factor) in enumerate(_LATENCIES):
        p50, p99 = figures[median] * factor, figures[tail] * factor
        panel.plot([p50, p99], [row, row], color=NEUTRAL, linewidth=3, solid_capstyle="round", zorder=1)
        panel.scatter([p50], [row], color=ACCENT, s=46, zorder=2, label="median" if row == 0 else None)
        panel.scatter([p99], [row], color=MISSED, s=46, zorder=2, label="99th percentile" if row == 0 else None)
        panel.text(p99, row, f"   {_span(p50)} … {_span(p99)}", va="center", fontsize=9)
    panel.set_yticks(range(len(_LATENCIES)), [label for label, *_ in _LATENCIES])
    panel.invert_yaxis()
    panel.set_xscale("log")
    longest = max(figures[tail] * factor for _, _, tail, factor in _LATENCIES)
    panel.set_xlim(10, longest * 30)
    ticks = {10: "10 µs", 100: "100 µs", 1_000: "1 ms", 10_000: "10 ms", 100_000: "100 ms"}
    shown = [tick for tick in ticks if tick <= longest]
    panel.set_xticks(shown, [ticks[tick] for tick in shown])
    panel.minorticks_off()
    panel.grid(axis="x", color="#e3e6ea")
    panel.set_axisbelow(True)
    panel.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    panel.set_title("Latencies (log scale)", fontsize=11, loc="left")


def _plain_ticks(panel: Any, ticks: tuple[float, ...], unit: str) -> None:
    low, high = panel.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_xticks(shown, [f"{tick:,g}{unit}" for tick in shown])
    panel.minorticks_off()
    panel.grid(axis="x", color="#e3e6ea")
    panel.set_axisbelow(True)


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"medians of {count} rounds"


def _span(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 1_000 else f"{microseconds / 1_000:.1f} ms"
