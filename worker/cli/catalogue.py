"""The commands about catalogues: `meterfall catalogue …`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.confirm import confirm, on_terminal
from worker.cli.errors import fail
from worker.cli.io import (
    REFUSED,
    login,
    open_resources,
    parse_optional_time,
    parse_time,
    print_json,
    print_rows,
    read_text,
    show_progress,
)
from worker.cli.options import ActorOption, JsonOption
from worker.errors import BadInput
from worker.rules.formats import moment
from worker.rules.words import counted

if TYPE_CHECKING:
    from schemas.answers import Parts
    from schemas.simulation import SimulationReport
    from worker.ledger.catalogues import CatalogueVersion

catalogue_app = typer.Typer(no_args_is_help=True, help="Compare catalogues, try one, and put one in force.")


@catalogue_app.command("diff")
def catalogue_diff(
    edited: Annotated[
        Path | None, typer.Argument(help="the edited catalogue; default METERFALL_CATALOGUE_PATH")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each value that a catalogue would change, and how many accounts have the value before it."""
    from config.catalogue import load_catalogue
    from worker.admin.catalogue_diff import differences

    with open_resources(compares_catalogues=False) as resources:
        settings = resources.settings
        catalogue = (
            load_catalogue(edited, sponsor_initial_units=settings.sponsor_initial_units)
            if edited is not None
            else resources.own_catalogue
        )
        print_rows([found._asdict() for found in differences(resources, catalogue)], as_json)


@catalogue_app.command("apply")
def catalogue_apply(
    file: Annotated[Path, typer.Argument(help="the catalogue to put in force (TOML)")],
    at: Annotated[
        str | None, typer.Option(help="from this moment on, ISO 8601 with offset; default now", metavar="TIME")
    ] = None,
    by: ActorOption = None,
    reason: Annotated[str | None, typer.Option(help="reason for the change; `catalogue list` shows it")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put a catalogue in force for all dynos, and show first what it changes; accounts take terms with a next period.

    Exit code 1 if it lacks a plan or a meter that accounts need, or if you do not confirm it.
    """
    from config.catalogue import parse_with_settings
    from worker.admin import catalogues
    from worker.admin.catalogue_diff import differences

    from_then = parse_optional_time("--at", at)
    with open_resources(compares_catalogues=False) as resources:
        settings = resources.settings
        catalogue = parse_with_settings(read_text(str(file)), str(file), settings, settings.default_plan)
        try:
            catalogues.require_applicable(resources, catalogue, from_then)
        except catalogues.CatalogueInUse as error:
            fail(str(error), REFUSED)
        found = [each._asdict() for each in differences(resources, catalogue)]
        if not as_json and (yes or on_terminal()):
            print_rows(found, as_json=False)
        what = (
            f"catalogue {catalogue.digest} would be in force from {at or 'now'} on: {counted(len(found), 'difference')}"
        )
        confirm(what, yes=yes, is_final=True)
        applied = catalogues.apply(resources, catalogue, by=login(by), reason=reason, at=from_then)
    if as_json:
        print_json({**_version_row(applied.version), "repeated": applied.repeated, "differences": found})
        return
    already = " already" if applied.repeated else ""
    typer.echo(
        f"catalogue {catalogue.digest} is version {applied.version.version}{already}, in force from "
        f"{moment(applied.version.effective_from)} on"
    )


@catalogue_app.command("list")
def catalogue_list(as_json: JsonOption = False) -> None:
    """List the catalogues that were, are or will be in force, the oldest first."""
    from worker.admin import catalogues

    with open_resources(compares_catalogues=False) as resources:
        print_rows([_version_row(version) for version in catalogues.history(resources)], as_json)


@catalogue_app.command("show")
def catalogue_show(
    version: Annotated[int | None, typer.Argument(help="number of a version; default the one in force")] = None,
) -> None:
    """Print the text of a catalogue, as it was applied."""
    from worker.admin import catalogues

    with open_resources(compares_catalogues=False) as resources:
        if version is None:
            typer.echo(resources.catalogue.text, nl=False)
            return
        found = {each.version: each for each in catalogues.history(resources)}
    if version not in found:
        raise BadInput(f"version: {version} does not exist; there are {', '.join(map(str, found))}")
    typer.echo(found[version].content, nl=False)


@catalogue_app.command("simulate")
def catalogue_simulate(
    file: Annotated[Path, typer.Argument(help="the catalogue to try (TOML)")],
    since: Annotated[
        str, typer.Option(help="events applied from this moment on, ISO 8601 with offset", metavar="TIME")
    ],
    until: Annotated[
        str | None, typer.Option(help="events applied before this moment; default now", metavar="TIME")
    ] = None,
    plan_map: Annotated[
        list[str] | None, typer.Option("--plan-map", metavar="OLD=NEW", help="try plan NEW for OLD; repeatable")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="only this many accounts, by the hash of their ids")] = None,
    user: Annotated[str | None, typer.Option(help="only this account")] = None,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="accounts to list: those that change most")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show what the events of a window would have paid under another catalogue, beside what they paid.

    It writes nothing.
    """
    from config.catalogue import parse_with_settings
    from worker.reports.simulation import Chosen, simulate

    begins, ends = parse_time("--since", since), parse_optional_time("--until", until)
    tried = _parse_plan_map(plan_map or [])
    text = read_text(str(file))
    with open_resources(compares_catalogues=False) as resources, show_progress("accounts simulated") as advance:
        catalogue = parse_with_settings(text, str(file), resources.settings)
        chosen = Chosen(sample=sample, user_id=user)
        report = simulate(
            resources, catalogue, begins, ends, plans=tried, chosen=chosen, most_changed=top, progress=advance
        )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print_simulation(report)


def _parse_plan_map(pairs: list[str]) -> dict[str, str]:
    """Return the plan to try in place of another, by code. Raises BadInput."""
    tried: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not old or not new:
            raise BadInput(f"--plan-map: {pair[:64]!r} must be OLD=NEW")
        if old in tried:
            raise BadInput(f"--plan-map: {old[:64]} is named twice")
        tried[old] = new
    return tried


def _print_simulation(report: SimulationReport) -> None:
    """Print a simulation for people: a row for each bucket of a plan and meter, then the accounts that change most."""
    typer.echo(
        f"catalogue {report.catalogue} instead of {report.in_force}, {moment(report.since)} to {moment(report.until)}: "
        f"{counted(report.events, 'event')} of {counted(report.accounts, 'account')}; "
        f"{report.changed:,} would have paid otherwise"
    )
    rows = [
        {
            "plan": plan.plan or "none",
            "tried": plan.simulated_plan or "none",
            "meter": meter.meter,
            **bucket,
        }
        for plan in report.plans
        for meter in plan.meters
        for bucket in _buckets(meter.paid, meter.simulated)
    ]
    print_rows(rows, as_json=False)
    if report.most_changed:
        typer.echo("the accounts that change most" + (", others change also" if report.more else ""))
        changed = [
            {"user": account.user_id, "meter": account.meter, **bucket}
            for account in report.most_changed
            for bucket in _buckets(account.paid, account.simulated)
        ]
        print_rows(changed, as_json=False)
    if report.refused:
        typer.echo(f"{counted(report.refused, 'event')} would cost more of a wallet than an event may, and be refused")
    for words in report.unknown:
        typer.echo(f"unknown: {words}")


def _buckets(paid: Parts, simulated: Parts) -> Iterator[dict[str, object]]:
    """Yield a row for each bucket that paid, or would have paid."""
    from worker.reports.simulation import buckets_of

    for name, before, after in buckets_of(paid, simulated):
        yield {"bucket": name, "paid": before, "simulated": after, "change": after - before}


def _version_row(version: CatalogueVersion) -> dict[str, object]:
    from config.catalogue import DIGEST_DIGITS

    return {
        "version": version.version,
        "digest": version.digest[:DIGEST_DIGITS],
        "effective_from": version.effective_from,
        "applied_at": version.applied_at,
        "by": version.applied_by,
        "reason": version.reason,
    }
