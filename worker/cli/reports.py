"""The commands that report: `meterfall usage` and `meterfall explain`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.io import open_resources, print_fields, print_json, print_rows
from worker.cli.options import EventArgument, JsonOption, User
from worker.errors import BadInput
from worker.rules.formats import moment

if TYPE_CHECKING:
    from schemas.reports import (
        Breakdown,
        Change,
        Engagement,
        EventPage,
        Explanation,
        MeterUsage,
        Timeline,
        UsageSummary,
    )


app = typer.Typer()


@app.command()
def usage(
    user: User,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="open periods by voice, model, document")] = False,
    engagement: Annotated[bool, typer.Option("--engagement", help="lifetime usage by voice, model and month")] = False,
    timeline: Annotated[bool, typer.Option("--timeline", help="every change, newest first")] = False,
    events: Annotated[bool, typer.Option("--events", help="every event, newest first")] = False,
    limit: Annotated[int | None, typer.Option(help="number of documents, changes or events listed")] = None,
    after: Annotated[str | None, typer.Option(help="--breakdown: documents after this meter/document")] = None,
    before_seq: Annotated[int | None, typer.Option(help="--timeline, --events: those before this one")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show limits and balances of an account, or one of the longer reports."""
    from worker.reports import usage as reports_usage

    if breakdown + engagement + timeline + events > 1:
        raise BadInput("usage: one of --breakdown, --engagement, --timeline and --events at a time")
    if after is not None and not breakdown:
        raise BadInput("--after: belongs to --breakdown")
    if before_seq is not None and not (timeline or events):
        raise BadInput("--before-seq: belongs to --timeline or --events")
    if limit is not None and not (breakdown or timeline or events):
        raise BadInput("--limit: belongs to --breakdown, --timeline or --events")
    options: dict[str, Any] = {}
    with open_resources() as resources:
        if breakdown:
            options = {"documents": limit} if limit is not None else {}
            _print_breakdown(reports_usage.breakdown(resources, user, after=after, **options), as_json)
        elif engagement:
            _print_engagement(reports_usage.engagement(resources, user), as_json)
        elif timeline:
            options = {"limit": limit} if limit is not None else {}
            _print_timeline(reports_usage.timeline(resources, user, before_seq=before_seq, **options), as_json)
        elif events:
            options = {"limit": limit} if limit is not None else {}
            _print_events(reports_usage.events(resources, user, before_seq=before_seq, **options), as_json)
        else:
            _print_summary(reports_usage.usage_summary(resources, user), as_json)


@app.command()
def explain(user: User, event: EventArgument, as_json: JsonOption = False) -> None:
    """Explain how much each bucket paid for an event, and why."""
    from worker.reports import explain as reports_explain

    with open_resources() as resources:
        found = reports_explain.explain(resources, user, event)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for sentence in found.sentences:
        typer.echo(sentence)
    if found.trace_id is not None:
        typer.echo(f"Trace: {found.trace_id}")
    if found.before is not None and found.after is not None:
        print_rows(_bucket_rows(found), as_json=False)


def _print_summary(summary: UsageSummary, as_json: bool) -> None:
    if as_json:
        print_json(summary.model_dump(mode="json"))
        return
    typer.echo(f"{summary.user_id}: {summary.plan_name} ({summary.plan}), {summary.status}, trust {summary.trust}")
    rows = [meter_row(usage) for usage in summary.meters]
    if not any(usage.wallet for usage in summary.meters):
        rows = [{name: value for name, value in row.items() if name not in _OF_WALLETS} for row in rows]
    print_rows(rows, as_json=False)


def _print_breakdown(found: Breakdown, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for rows in (found.periods, found.voices, found.documents):
        print_rows([row.model_dump() for row in rows], as_json=False)
    if found.more_documents_after is not None:
        typer.echo(f"more documents: --after {found.more_documents_after}", err=True)


def _print_engagement(found: Engagement, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_fields(found.model_dump(exclude={"months"}), as_json=False)
    print_rows([month.model_dump() for month in found.months], as_json=False)


def _print_timeline(found: Timeline, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_rows([_change_row(change) for change in found.changes], as_json=False)
    if found.more_before_seq is not None:
        typer.echo(f"older changes: --before-seq {found.more_before_seq}", err=True)


def _print_events(found: EventPage, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    shown = {"seq", "applied_at", "meter", "event_id", "amount", "source", "reversed_at"}
    print_rows([each.model_dump(include=shown) for each in found.events], as_json=False)
    if found.more_before_seq is not None:
        typer.echo(f"older events: --before-seq {found.more_before_seq}", err=True)


# Columns that are shown if a meter draws on a wallet.
_OF_WALLETS = ("wallet", "price", "quantity", "wallet_used")


def meter_row(usage: MeterUsage) -> dict[str, object]:
    """Return limit and balances of one meter as a row of a table."""
    row: dict[str, object] = usage.model_dump(exclude={"unit", "cadence", "period_start"})
    return row | {name: "unlimited" for name in ("limit", "available") if row[name] is None}


def _change_row(change: Change) -> dict[str, object]:
    """Return a change as a row: its parts or moved units, without zeros."""
    moved = change.parts or change.changes
    units = {name: number for name, number in moved.model_dump().items() if number} if moved else {}
    row = change.model_dump(include={"seq", "at", "kind", "meter", "what", "amount"})
    return {**row, "what": _what(change), "moved": units, "by": change.actor, "reason": change.reason}


def _what(change: Change) -> str:
    """Name the subject of a change: the event or key, or the new plan, status or schedule."""
    detail = change.detail or {}
    if change.kind == "schedule":
        coming = [(detail["next_plan"], detail["plan_change_at"]), (detail["next_status"], detail["status_change_at"])]
        return (
            ", ".join(
                f"{name} from {moment(datetime.fromisoformat(str(at))) if at else 'the next renewal'}"
                for name, at in coming
                if name
            )
            or "nothing"
        )
    if change.kind == "change_plan" and change.meter:
        return "unlimited" if detail["allowance"] is None else f"allowance {detail['allowance']:,}"
    new = {"set_status": "status", "set_trust": "trust", "close": "status", "change_plan": "plan"}.get(change.kind)
    if new is None or new not in detail:
        return change.what
    before, after = detail["before"], detail[new]
    return f"{before} → {after}" if before != after else f"stays {after}"


def _bucket_rows(found: Explanation) -> list[dict[str, object]]:
    assert found.before is not None
    assert found.after is not None
    after = found.after.model_dump()
    return [
        {"bucket": name, "before": units, "after": after[name]} for name, units in found.before.model_dump().items()
    ]
